"""Adapters on a pipeline: put there, weakened, mixed, merged, taken off; each an identity, none with a mock."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetuning.adapters.adapter import add_boft, add_lora
from finetuning.adapters.pipelines import (
    adapted_parts,
    get_strengths,
    load_adapter,
    load_base,
    load_run,
    merge_adapter,
    mix_adapters,
    set_strength,
    strengths,
    unload_adapter,
)
from finetuning.errors import InputError

MAKERS = {
    "boft": lambda module: add_boft(module, ["attention"], block_size=4, factors=2, dropout=0.5),
    "boft with biases": lambda module: add_boft(module, ["attention"], block_size=4, bias="boft_only"),
    "boft everywhere": lambda module: add_boft(module, ["all"], block_size=4),
    "lora": lambda module: add_lora(module, ["attention"], rank=2, alpha=3, dropout=0.5),
}


def write_run(folder: Path, base: Path, make, *, seed: int = 0, size: float = 0.2) -> Path:
    """A run's output folder with adapters of random values on UNet and text encoder."""
    pipeline = load_base(str(base))
    random = torch.Generator().manual_seed(seed)
    for part in ("unet", "text_encoder"):
        module = getattr(pipeline, part).requires_grad_(False)
        adapter = make(module)
        for _, parameter in adapter.named_trainables():
            parameter.data += size * torch.randn(parameter.shape, generator=random)
        adapter.save(folder / part)
    (folder / "config.yaml").write_text(yaml.safe_dump({"pretrained_model_name_or_path": str(base)}))
    return folder


def answer(pipeline) -> torch.Tensor:
    """What UNet and text encoder say, in one tensor."""
    random = torch.Generator().manual_seed(3)
    config, width = pipeline.unet.config, pipeline.text_encoder.config.hidden_size
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=random)
    ids = pipeline.tokenizer(["a red mug in the snow"] * 2, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(ids)[0]
        assert text.shape[-1] == width
        return torch.cat([pipeline.unet(x, torch.tensor([3, 500]), text).sample.flatten(), text.flatten()])


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: write_run(folder / kind.replace(" ", "_"), toy_base, make) for kind, make in MAKERS.items()}


@pytest.fixture
def pipeline(toy_base):
    return load_base(str(toy_base))


@pytest.mark.parametrize("kind", MAKERS)
def test_an_adapter_comes_and_goes_and_leaves_the_base_bit_for_bit(kind, runs, pipeline):
    base, tensors = answer(pipeline), weights(pipeline)
    modules = [name for name, _ in pipeline.unet.named_modules()]
    hooks = len(pipeline.unet._forward_pre_hooks)
    assert load_adapter(pipeline, runs[kind]) == runs[kind].name
    tuned = answer(pipeline)
    assert (tuned - base).abs().mean() > 1e-2
    assert torch.equal(tuned, answer(pipeline))  # no dropout
    assert [name for name, _ in pipeline.unet.named_modules()] == modules  # nothing that could cost time

    set_strength(pipeline, 0)
    assert torch.equal(answer(pipeline), base)
    set_strength(pipeline, 0.5)
    half = answer(pipeline)
    assert 0 < (half - base).abs().mean() < (tuned - base).abs().mean()
    with strengths(pipeline, {runs[kind].name: 1}):
        assert torch.equal(answer(pipeline), tuned)
    assert torch.equal(answer(pipeline), half)

    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), base)
    after = weights(pipeline)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in after)
    assert [name for name, _ in pipeline.unet.named_modules()] == modules
    assert len(pipeline.unet._forward_pre_hooks) == hooks and not hasattr(pipeline.unet, "peft_config")
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())
    assert get_strengths(pipeline) == {}


@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_what_was_trained(kind, runs, toy_base, pipeline):
    trained = load_base(str(toy_base))
    for part in ("unet", "text_encoder"):
        adapter = MAKERS[kind](getattr(trained, part).requires_grad_(False))
        adapter.load(runs[kind] / part)
        adapter.module.eval()
    load_adapter(pipeline, runs[kind])
    torch.testing.assert_close(answer(pipeline), answer(trained), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(load_run(runs[kind])), answer(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_merged_is_unmerged(kind, strength, runs, pipeline):
    load_adapter(pipeline, runs[kind], strength)
    unmerged = answer(pipeline)
    merge_adapter(pipeline)
    torch.testing.assert_close(answer(pipeline), unmerged, rtol=1e-4, atol=1e-5)
    assert not hasattr(pipeline.unet, "peft_config") and get_strengths(pipeline) == {}
    assert not any("base_layer" in name for name in weights(pipeline))


@pytest.mark.parametrize("kind", ["boft", "boft with biases", "lora"])
def test_several_adapters(kind, runs, toy_base, pipeline, tmp_path):
    other = write_run(tmp_path / "other", toy_base, MAKERS[kind], seed=5)
    load_adapter(pipeline, runs[kind], name="one")
    one = answer(pipeline)
    load_adapter(pipeline, other, name="two")
    both = answer(pipeline)
    set_strength(pipeline, {"two": 0})
    assert torch.equal(answer(pipeline), one)
    set_strength(pipeline, {"one": 0, "two": 1})
    two = answer(pipeline)
    assert torch.equal(two, answer(load_run(other)))
    set_strength(pipeline, 1)
    assert torch.equal(answer(pipeline), both)
    assert min((both - one).abs().mean(), (both - two).abs().mean()) > 1e-2
    assert load_adapter(pipeline, other) == "other" and load_adapter(pipeline, other) == "other-2"


@pytest.mark.parametrize("kind", ["boft", "boft with biases", "lora"])
def test_a_mixture_of_one_is_its_strength(kind, runs, toy_base, pipeline, tmp_path):
    other = write_run(tmp_path / "other", toy_base, MAKERS[kind], seed=5)
    load_adapter(pipeline, runs[kind], 0.3, name="one")
    expected = answer(pipeline)
    load_adapter(pipeline, other, 0, name="two")
    mix_adapters(pipeline, {"one": 0.3, "two": 0}, "mixed")
    assert get_strengths(pipeline) == {"one": 0, "two": 0, "mixed": 1}
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-4, atol=1e-5)
    mix_adapters(pipeline, {"two": 0.5, "one": 0.5}, "halves")
    half = answer(pipeline)
    mix_adapters(pipeline, {"one": 0.5, "two": 0.5}, "same halves")
    torch.testing.assert_close(answer(pipeline), half, rtol=1e-4, atol=1e-5)
    base = load_base(str(toy_base))
    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), answer(base))


def test_boft_and_lora_go_together_once_one_is_merged(runs, toy_base, pipeline):
    before, changes = weights(pipeline), {}
    for kind in ("boft everywhere", "lora"):
        load_adapter(pipeline, runs[kind])
        changes[kind] = {name: tensor - before[name] for name, tensor in weights(pipeline).items()}
        unload_adapter(pipeline)
    load_adapter(pipeline, runs["boft everywhere"])
    with pytest.raises(InputError, match="merge_adapter"):
        load_adapter(pipeline, runs["lora"])
    merge_adapter(pipeline)
    load_adapter(pipeline, runs["lora"])
    for name, tensor in weights(pipeline).items():  # both changes, whichever came first
        both = before[name] + changes["boft everywhere"][name] + changes["lora"][name]
        torch.testing.assert_close(tensor, both, rtol=1e-4, atol=1e-5)


def test_a_part_and_a_checkpoint_can_be_loaded_too(runs, pipeline, tmp_path):
    load_adapter(pipeline, runs["boft"] / "unet")
    assert set(adapted_parts(pipeline)) == {"unet"}
    unload_adapter(pipeline)
    load_adapter(pipeline, runs["boft"] / "text_encoder")
    assert set(adapted_parts(pipeline)) == {"text_encoder"}
    unload_adapter(pipeline)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(runs["boft"], checkpoint)
    (checkpoint / "config.yaml").rename(tmp_path / "run" / "config.yaml")
    assert load_adapter(pipeline, checkpoint) == "checkpoint-4"


def test_a_copy_of_the_base_is_the_same_base_and_another_one_is_not(runs, toy_base, sd15_base, tmp_path):
    copy = Path(shutil.copytree(toy_base, tmp_path / "copy"))
    pipeline = load_base(str(copy))
    load_adapter(pipeline, runs["boft"])
    unload_adapter(pipeline)

    name = next((copy / "unet").glob("*.safetensors"))
    tensors = load_file(name)
    tensors["conv_in.bias"] += 1
    save_file(tensors, name, metadata={"format": "pt"})
    pipeline = load_base(str(copy))
    with pytest.raises(InputError) as caught:
        load_adapter(pipeline, runs["boft"])
    assert str(toy_base) in str(caught.value) and str(copy) in str(caught.value)
    load_adapter(pipeline, runs["boft"], check_base=False)

    pipeline = load_base(str(sd15_base))
    base = answer(pipeline)
    with pytest.raises(InputError) as caught:
        load_adapter(pipeline, runs["boft everywhere"], check_base=False)
    assert str(toy_base) in str(caught.value) and str(sd15_base) in str(caught.value)
    assert torch.equal(answer(pipeline), base) and not hasattr(pipeline.unet, "peft_config")


def test_what_does_not_fit_beside_another_leaves_that_one_as_it_was(runs, sd15_base, toy_base, pipeline, tmp_path):
    load_adapter(pipeline, runs["boft"], 0.5)
    before = answer(pipeline)
    foreign = write_run(tmp_path / "foreign", sd15_base, MAKERS["boft"])
    with pytest.raises(InputError, match="does not fit"):
        load_adapter(pipeline, foreign, check_base=False)
    with pytest.raises(InputError, match=r"is LoRA, .* carries BOFT"):
        load_adapter(pipeline, runs["lora"])
    wide = write_run(tmp_path / "wide", toy_base, lambda module: add_boft(module, ["to_q", "q_proj"], block_size=8))
    load_adapter(pipeline, wide, 0)
    with pytest.raises(InputError, match="different shapes"):
        mix_adapters(pipeline, {"boft": 1, "wide": 1}, "mixed")
    assert get_strengths(pipeline) == {"boft": 0.5, "wide": 0}
    assert torch.equal(answer(pipeline), before)


def test_wrong_input(runs, pipeline, tmp_path):
    base = answer(pipeline)

    def fails(path, match, **options):
        with pytest.raises(InputError, match=match):
            load_adapter(pipeline, path, **options)
        assert torch.equal(answer(pipeline), base) and get_strengths(pipeline) == {}

    fails(tmp_path, "holds no adapter")
    fails(tmp_path / "absent", "no such folder")
    fails("nobody/nothing", "not loaded from the hub; check the name and the network")
    fails(tmp_path / "mug.bin", "pickle")
    fails(runs["boft"] / "config.yaml", "is a file")
    fails(pipeline.name_or_path, "whole pipeline")
    for strength in ("1", None, True, float("nan"), [1]):
        fails(runs["boft"], "strength=.*must be a finite number", strength=strength)
    for name in ("a.b", "", "half", "keys"):
        fails(runs["boft"], "must be a word without a dot", name=name)

    pickled = Path(shutil.copytree(runs["boft"], tmp_path / "pickled"))
    (pickled / "unet" / "adapter_model.safetensors").rename(pickled / "unet" / "adapter_model.bin")
    fails(pickled, "pickle")
    cut = Path(shutil.copytree(runs["boft"], tmp_path / "cut"))
    content = (cut / "unet" / "adapter_model.safetensors").read_bytes()
    (cut / "unet" / "adapter_model.safetensors").write_bytes(content[:1000])
    fails(cut, "cannot be read")
    odd = Path(shutil.copytree(runs["boft"], tmp_path / "odd"))
    config = json.loads((odd / "unet" / "adapter_config.json").read_text())
    (odd / "unet" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "OFT"}))
    fails(odd, "BOFT and LoRA")
    fewer = Path(shutil.copytree(runs["lora"], tmp_path / "fewer"))
    tensors = load_file(fewer / "text_encoder" / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, fewer / "text_encoder" / "adapter_model.safetensors")
    fails(fewer, "adapts other layers")

    load_adapter(pipeline, runs["boft"])
    with pytest.raises(InputError, match="mug: no such adapter on the pipeline; there are: boft"):
        set_strength(pipeline, {"mug": 1})
    with pytest.raises(InputError, match="strength of boft='x'"):
        set_strength(pipeline, {"boft": "x"})
    with pytest.raises(InputError, match="is on the pipeline"):
        load_adapter(pipeline, runs["boft"], name="boft")
    with pytest.raises(InputError, match="no such adapter"):
        mix_adapters(pipeline, {"mug": 1}, "mixed")
