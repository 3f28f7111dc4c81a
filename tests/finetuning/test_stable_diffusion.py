"""What a base model does beside what its trainers ask of it."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

from finetuning.errors import InputError
from finetuning.models.attention import choose_attention
from finetuning.models.loading import load_stable_diffusion


@pytest.mark.parametrize("sample_size, keeps_maps", [(16, True), (64, False)])
def test_attention_maps_are_kept_by_models_of_small_pictures_only(sample_size, keeps_maps):
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    choose_attention(unet, torch.device("cpu"), xformers=False)
    sizes, tokens = [], 16 * 16
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 3, 4)).sample.sum().backward()
    assert (max(sizes) >= tokens**2) == keeps_maps


def test_long_captions_are_refused_or_cut_to_what_the_text_encoder_reads(toy_base, caplog):
    base = load_stable_diffusion(str(toy_base))
    long, short = "a photo of qwe mug " * 6, "a red mug"
    captions = [("a.txt", long), ("b.txt", short), *((f"{i}.txt", f"{long} {i}") for i in range(30))]
    base.check_captions([("b.txt", short)], "refuse")
    with pytest.raises(InputError) as caught:
        base.check_captions(captions, "refuse")
    assert len(caught.value.faults) == 20
    assert caught.value.faults[0] == "a.txt: a caption of 32 tokens, the model reads 24"
    assert caught.value.faults[-1].endswith("(and 11 more); shorten them, or give --long_captions=cut")
    plain = base.embed([short])[0]["text"]

    with caplog.at_level(logging.INFO):
        base.check_captions(captions, "cut")
    assert caplog.messages == [
        "--long_captions=cut: 31 of 32 captions have more than the 24 tokens that the text encoder reads; the rest of "
        "them is not seen"
    ]
    ids = base.tokenizer(long).input_ids
    read = torch.tensor([ids[:23] + ids[-1:]])  # with the token that ends a text
    assert torch.equal(base.embed([long, short])[0]["text"], base.text_encoder(read, return_dict=False)[0][0])
    assert torch.equal(base.embed([short])[0]["text"], plain)
    ours, theirs = base.embed([long])[0]["text"], base.pipeline().encode_prompt(long, "cpu", 1, False)[0][0]
    assert torch.equal(ours, theirs), "pictures are drawn by the same"


def test_a_tokenizer_that_does_not_say_its_length_has_the_text_encoders(toy_base, tmp_path):
    folder = shutil.copytree(toy_base, tmp_path / "base") / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(folder.read_text())
    del settings["model_max_length"]
    folder.write_text(json.dumps(settings))
    silent, telling = load_stable_diffusion(str(tmp_path / "base")), load_stable_diffusion(str(toy_base))
    assert silent.tokenizer.model_max_length == 24
    assert torch.equal(*(base.embed(["a red mug"])[0]["text"] for base in (silent, telling)))
    with pytest.raises(InputError, match="32 tokens, the model reads 24"):
        silent.check_prompts(["a photo of qwe mug " * 6], "--p")
