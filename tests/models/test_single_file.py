"""Single files in the original layout load to the very weights, offline, and say what they predict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tiny_pipelines import build_sd15, build_sdxl
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetuning.errors import InputError
from finetuning.export.original_layout import open_clip, original_layout, rename, unet_units, vae_units
from finetuning.models.registry import load_family
from finetuning.models.single_file import LAYOUTS, load_single_file

XL, SD2, SD1 = LAYOUTS
MEASURES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim", "hidden_act",
    "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def small(layout, pipeline):
    """The layout with the configurations of a tiny pipeline in the place of the real ones."""
    parts = {}
    for part, (library, kind, _) in layout.parts.items():
        config = getattr(pipeline, part).config
        if library == "transformers":
            config = {key: value for key, value in config.to_dict().items() if key in MEASURES}
        parts[part] = (library, kind, {key: value for key, value in dict(config).items() if key[0] != "_"})
    return (replace(layout, parts=parts),)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """(tensors of the original layout, tiny pipeline, folder of its tokenizer)."""
    folder = build_sdxl(tmp_path_factory.mktemp("sdxl"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    units = unet_units({**pipeline.unet.config, "addition_embed_type": None})
    units |= {f"add_embedding.linear_{i + 1}": (f"label_emb.0.{2 * i}", {}) for i in range(2)}
    tensors = {f"model.diffusion_model.{rename(k, units)}": v for k, v in pipeline.unet.state_dict().items()}
    for key, tensor in pipeline.vae.state_dict().items():
        name = rename(key, vae_units(pipeline.vae.config))
        is_matrix = ".mid.attn_1." in name and tensor.ndim == 2
        tensors[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_matrix else tensor
    first, second = (
        {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    tensors |= {f"conditioner.embedders.0.transformer.text_model.{key}": tensor for key, tensor in first.items()}
    projection = second.pop("text_projection.weight")
    second = {**open_clip(second), "text_projection": projection.T}
    tensors |= {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in second.items()}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, pipeline, str(folder / "tokenizer")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = build_sd15(tmp_path_factory.mktemp("sd15"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    tensors = original_layout(
        pipeline.unet.state_dict(), pipeline.vae.state_dict(), pipeline.text_encoder.state_dict(),
        pipeline.unet.config, pipeline.vae.config, "quick_gelu",
    )  # fmt: skip
    return tensors, pipeline, str(folder / "tokenizer")


def same_weights(base, pipeline, parts) -> None:
    for part in parts:
        wanted, got = getattr(pipeline, part).state_dict(), getattr(base, part).state_dict()
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[key], got[key]) for key in wanted), part


@pytest.mark.parametrize("family, layout", [("sdxl", XL), ("sd15", SD1)])
def test_a_file_loads_to_the_weights_that_were_written(family, layout, request, tmp_path):
    tensors, pipeline, tokenizer = request.getfixturevalue(family)
    save_file(tensors, path := str(tmp_path / "model.safetensors"))
    base = load_single_file(path, tokenizer, layouts=small(layout, pipeline))
    same_weights(base, pipeline, ("unet", "vae", *base.encoder_parts))
    assert base.prediction_type == "epsilon"
    prompts = ["a photo of qwe mug", ""]
    if family == "sdxl":
        wanted, empty, pooled, _ = pipeline.encode_prompt(prompts[0])
        embedded, zeros = base.embed(prompts)
        torch.testing.assert_close(embedded["text"][None], wanted)
        torch.testing.assert_close(embedded["pooled"][None], pooled)
        assert torch.equal(zeros["text"], empty[0]) and not zeros["pooled"].any()


def test_what_a_file_predicts(sdxl, tmp_path):
    tensors, pipeline, tokenizer = sdxl
    layouts, empty = small(XL, pipeline), torch.empty(0)
    save_file({**tensors, "v_pred": empty, "ztsnr": empty}, keyed := str(tmp_path / "keyed.safetensors"))
    base = load_single_file(keyed, tokenizer, layouts=layouts)
    assert base.prediction_type == base.process.prediction == base.scheduler.config.prediction_type == "v_prediction"
    assert base.process.alpha_bar[-1] < 1e-6  # pure noise at the end
    assert load_single_file(keyed, tokenizer, "epsilon", layouts=layouts).prediction_type == "epsilon"

    save_file(tensors, spec := str(tmp_path / "spec.safetensors"), metadata={"modelspec.prediction_type": "v"})
    base = load_single_file(spec, tokenizer, layouts=layouts)
    assert base.prediction_type == "v_prediction" and base.process.alpha_bar[-1] > 1e-3

    save_file(tensors, other := str(tmp_path / "other.safetensors"), metadata={"modelspec.prediction_type": "flow"})
    with pytest.raises(InputError, match=r"flow cannot be trained; give --prediction_type=epsilon"):
        load_single_file(other, tokenizer, layouts=layouts)


def test_other_files_are_refused(sdxl, tmp_path):
    tensors, _, tokenizer = sdxl
    first = "model.diffusion_model.input_blocks.0.0.weight"

    def refusal(tensors, called="model.safetensors", **options) -> str:
        save_file(tensors, path := str(tmp_path / called))
        with pytest.raises(InputError) as caught:
            load_family(path, tokenizer_name=tokenizer, **options)
        return str(caught.value)

    assert "has no UNet" in refusal({"lora_unet_x.lora_up.weight": torch.ones(1)})
    assert "has no text encoder" in refusal({k: v for k, v in tensors.items() if not k.startswith("conditioner")})
    assert "has no VAE" in refusal({k: v for k, v in tensors.items() if not k.startswith("first_stage")})
    assert "reads 9 channels" in refusal({**tensors, first: torch.ones(16, 9, 3, 3)})
    vae = "first_stage_model.decoder.conv_in.weight"
    second = {SD2.key: torch.ones(1), first: torch.ones(1, 4, 1, 1), vae: torch.ones(1)}
    assert "does not say whether it predicts noise or v" in refusal(second)
    assert f"train {XL.base} instead" in refusal(tensors, "dreamshaperXL_v21TurboDPMSDE.safetensors")
    assert "no .safetensors file" in refusal(tensors, "model.ckpt")
    assert "--revision=main: " in refusal(tensors, revision="main")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="is it complete"):
        load_family(str(tmp_path / "cut.safetensors"))


def test_weights_that_are_not_there_are_not_drawn(sdxl, tmp_path):
    tensors, pipeline, tokenizer = sdxl
    for lost in (
        "conditioner.embedders.1.model.ln_final.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.conv_out.bias",
    ):
        save_file({k: v for k, v in tensors.items() if k != lost}, path := str(tmp_path / "model.safetensors"))
        with pytest.raises(InputError, match="cannot be loaded; is it complete"):
            load_single_file(path, tokenizer, layouts=small(XL, pipeline))


def test_without_a_tokenizer_the_error_says_which(sdxl, tmp_path):
    save_file(sdxl[0], path := str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match=r"give --tokenizer_name, a folder with CLIP's vocab\.json"):
        load_family(path)
    with pytest.raises(InputError, match="no CLIP tokenizer in it"):
        load_family(path, tokenizer_name=str(tmp_path))


@pytest.mark.parametrize(
    "layout, unet, encoders",
    [
        (XL, 2_567_463_684, [123_060_480, 694_659_840]),
        (SD2, 865_910_724, [340_387_840]),
        (SD1, 859_520_964, [123_060_480]),
    ],
)
def test_configurations_are_those_of_the_published_models(layout, unet, encoders):
    """By their numbers of weights, as published; no weights are made."""

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with init_empty_weights():
        assert count(UNet2DConditionModel(**layout.parts["unet"][2])) == unet
        assert count(AutoencoderKL(**layout.parts["vae"][2])) == 83_653_863
        kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        found = [kinds[kind](CLIPTextConfig(**config)) for _, kind, config in layout.parts.values() if kind in kinds]
        assert [count(encoder) for encoder in found] == encoders
