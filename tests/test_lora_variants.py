"""Folders of stock peft: each variant of LoRA is drawn with and exported as it was trained, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_inference import answer, weights

from boft import BOFTConfig
from finetuning.adapters.pipelines import (
    get_strengths,
    load_adapter,
    load_base,
    mix_adapters,
    set_strength,
    unload_adapter,
)
from finetuning.adapters.stored import read_adapter
from finetuning.errors import InputError
from finetuning.export.lora import save_lora
from finetuning.export.peft import save_for_peft

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DRAWN = {
    "plain": {"target_modules": ["to_q", "to_v"]},
    "rsLoRA": {"target_modules": ["to_q"], "use_rslora": True, "lora_alpha": 6},
    "ranks": {"target_modules": ["to_q", "to_k"], "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 7}},
    "rsLoRA with ranks": {"target_modules": ["to_q", "to_k"], "rank_pattern": {"to_q": 2}, "use_rslora": True},
    "convolutions": {"target_modules": ["conv1", "conv_shortcut", "proj_in"], "lora_alpha": 3},
    "pattern": {"target_modules": r".*attn1\.to_(q|out\.0)"},
    "excluded": {"target_modules": ["to_q"], "exclude_modules": [FIRST]},
    "orthogonal": {"target_modules": ["to_q"], "init_lora_weights": "orthogonal"},
    "biases": {"target_modules": ["to_out.0"], "bias": "lora_only"},
}
REFUSED = {
    "DoRA (use_dora": {"target_modules": ["to_q"], "use_dora": True},
    "LoRA with biases of its own (lora_bias": {"target_modules": ["to_out.0"], "lora_bias": True},
    "LoRA on single parameters (target_parameters": {"target_modules": [], "target_parameters": ["to_q.weight"]},
    "replaces whole modules (modules_to_save": {"target_modules": ["to_q"], "modules_to_save": ["conv_in"]},
    "init_lora_weights='pissa'": {"target_modules": ["to_q"], "init_lora_weights": "pissa"},
    "init_lora_weights='pissa_niter_4'": {"target_modules": ["to_q"], "init_lora_weights": "pissa_niter_4"},
    "init_lora_weights='olora'": {"target_modules": ["to_q"], "init_lora_weights": "olora"},
}
REFUSED_TEXT = {
    "LoRA on an embedding": {"target_modules": ["token_embedding"]},
    "trained tokens (trainable_token_indices": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"token_embedding": [1, 2]},
    },
}


def write_lora(folder: Path, base: Path, part: str = "unet", seed: int = 0, config=None, **settings) -> Path:
    """A folder as stock peft writes it, and in answer.pt what the trained model says."""
    torch.manual_seed(seed)
    pipeline = load_base(str(base))
    module = getattr(pipeline, part).requires_grad_(False)
    model = get_peft_model(module, config or LoraConfig(**{"r": 4, **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.eval().save_pretrained(str(folder))
    torch.save(answer(pipeline), folder / "answer.pt")
    return folder


def off(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("variant", DRAWN)
def test_what_is_drawn_exported_mixed_and_unloaded_is_what_was_trained(variant, toy_base, tmp_path):
    folder = write_lora(tmp_path / "adapter", toy_base, **DRAWN[variant])
    trained = torch.load(folder / "answer.pt")
    pipeline = load_base(str(toy_base))
    base, tensors = answer(pipeline), weights(pipeline)
    load_adapter(pipeline, folder, name="one")
    assert off(trained, base) > 1e-2 and off(answer(pipeline), trained) < 1e-4

    report, lost = save_lora(pipeline, tmp_path / "lora.safetensors")
    assert {row.energy for row in report} == {1.0}
    assert lost == (["8 trained biases"] if variant == "biases" else [])
    if variant != "biases":
        other = load_base(str(toy_base))
        other.load_lora_weights(tmp_path / "lora.safetensors")
        assert off(answer(other), trained) < 1e-4

    for name in ("one", "same"):
        if name == "same":
            mix_adapters(pipeline, {"one": 1.0}, "same")
            assert off(answer(pipeline), trained) < 1e-4
        save_for_peft(pipeline, tmp_path / name)
        other = load_base(str(toy_base))
        PeftModel.from_pretrained(other.unet, str(tmp_path / name / "unet")).eval()
        assert off(answer(other), trained) < 1e-4
    mix_adapters(pipeline, {"one": -0.5, "same": 0.75}, "quarter")
    mixture = answer(pipeline)
    set_strength(pipeline, {"one": 0.25, "same": 0, "quarter": 0})
    assert off(mixture, answer(pipeline)) < 1e-4

    set_strength(pipeline, 0)
    assert torch.equal(answer(pipeline), base)
    set_strength(pipeline, {"one": 0.5})
    unload_adapter(pipeline)
    after = weights(pipeline)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in after)


@pytest.mark.parametrize("message", [*REFUSED, *REFUSED_TEXT])
def test_what_is_more_than_two_matrices_is_refused_by_name(message, toy_base, tmp_path):
    part, settings = ("text_encoder", REFUSED_TEXT[message]) if message in REFUSED_TEXT else ("unet", REFUSED[message])
    folder = write_lora(tmp_path / "adapter", toy_base, part, **settings)
    pipeline = load_base(str(toy_base))
    tensors = weights(pipeline)
    with pytest.raises(InputError) as caught:
        load_adapter(pipeline, folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)
    after = weights(pipeline)
    assert get_strengths(pipeline) == {} and after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in after)


def test_settings_of_a_newer_peft_are_refused(toy_base, tmp_path):
    folder = write_lora(tmp_path / "adapter", toy_base, target_modules=["to_q"])
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_tomorrows_lora": False, "tomorrows_size": 16}))
    load_adapter(load_base(str(toy_base)), folder)
    path.write_text(json.dumps({**config, "use_tomorrows_lora": True}))
    with pytest.raises(InputError, match="use_tomorrows_lora=true"):
        load_adapter(load_base(str(toy_base)), folder)


def test_a_lora_file_holds_the_very_matrices(toy_base, tmp_path):
    folder = write_lora(tmp_path / "adapter", toy_base, target_modules=["to_q"], lora_alpha=6)
    pipeline = load_base(str(toy_base))
    load_adapter(pipeline, folder, name="one")
    report, lost = save_lora(pipeline, tmp_path / "lora.safetensors", rank=4)
    assert lost == [] and {row.rank for row in report} == {4}
    stored, written = load_file(folder / "adapter_model.safetensors"), load_file(tmp_path / "lora.safetensors")
    key = f"base_model.model.{FIRST}"
    there = "lora_unet_" + FIRST.replace(".", "_")
    assert torch.equal(written[f"{there}.lora_down.weight"], stored[f"{key}.lora_A.weight"])
    assert torch.equal(written[f"{there}.lora_up.weight"], stored[f"{key}.lora_B.weight"])
    assert written[f"{there}.alpha"] == 6

    report, lost = save_lora(pipeline, tmp_path / "cut.safetensors", rank=1)
    assert {row.rank for row in report} == {1} and "squared change" in lost[0] and len(lost) == 1

    other = write_lora(tmp_path / "other", toy_base, seed=1, target_modules=["to_q", "to_k"])
    load_adapter(pipeline, other, strength=-0.5)
    both = answer(pipeline)
    report, lost = save_lora(pipeline, tmp_path / "both.safetensors")
    assert lost == [] and {row.rank for row in report} == {4, 8}
    pipeline = load_base(str(toy_base))
    pipeline.load_lora_weights(tmp_path / "both.safetensors")
    assert off(answer(pipeline), both) < 1e-4


# Names


def rename(folder: Path, change, settings=None) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **(settings or {})}))
    return folder


BEFORE = "base_model.model."
LAYER = "encoder.layers.0.self_attn.q_proj"
NAMES = {
    "of transformers 4": (lambda key: key.replace(BEFORE, f"{BEFORE}text_model."), {}),
    "of transformers 5": (lambda key: key.replace(f"{BEFORE}text_model.", BEFORE), {}),
    "of transformers 4, in full": (
        lambda key: key.replace(BEFORE, f"{BEFORE}text_model."),
        {"target_modules": [f"text_model.{LAYER}"]},
    ),
    "of transformers 4, as a pattern": (
        lambda key: key.replace(BEFORE, f"{BEFORE}text_model."),
        {"target_modules": rf"text_model\.{LAYER}".replace(".0.", r"\.0\.")},
    ),
    "compiled": (lambda key: key.replace(BEFORE, f"{BEFORE}_orig_mod."), {"target_modules": [f"_orig_mod.{LAYER}"]}),
    "compiled outside": (lambda key: f"_orig_mod.{key}", {}),
    "compiled inside": (lambda key: key.replace(".self_attn", "._orig_mod.self_attn"), {}),
}


@pytest.mark.parametrize("kind", ["boft", "lora"])
@pytest.mark.parametrize("names", NAMES)
def test_names_of_other_versions_and_of_compiled_modules(names, kind, toy_base, tmp_path):
    targets = [next(name for name, _ in load_base(str(toy_base)).text_encoder.named_modules() if name.endswith(LAYER))]
    config = LoraConfig(r=2, target_modules=targets, rank_pattern={targets[0]: 3})
    if kind == "boft":
        config = BOFTConfig(boft_block_size=4, target_modules=targets)
    folder = write_lora(tmp_path / "adapter", toy_base, "text_encoder", config=config)
    trained = torch.load(folder / "answer.pt")
    change, settings = NAMES[names]
    rename(folder, lambda key: change(key.replace(".text_model.", ".")), settings)
    pipeline = load_base(str(toy_base))
    base = answer(pipeline)
    load_adapter(pipeline, folder)
    assert off(answer(pipeline), trained) < 1e-4 < off(trained, base)


def test_a_folder_of_a_compiled_unet_on_a_compiled_pipeline(toy_base, tmp_path):
    torch.manual_seed(0)
    pipeline = load_base(str(toy_base))
    pipeline.unet = torch.compile(pipeline.unet.requires_grad_(False), backend="eager")
    model = get_peft_model(pipeline.unet, LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert "_orig_mod" in next(iter(load_file(tmp_path / "adapter" / "adapter_model.safetensors")))
    plain = load_base(str(toy_base))
    base = answer(plain)
    load_adapter(plain, tmp_path / "adapter")
    trained = answer(plain)
    pipeline = load_base(str(toy_base))
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert off(answer(pipeline), base) < 1e-5
    load_adapter(pipeline, tmp_path / "adapter")
    assert off(answer(pipeline), trained) < 1e-5 < off(trained, base)
    set_strength(pipeline, 0)
    assert off(answer(pipeline), base) < 1e-5


def test_a_text_encoder_of_transformers_4_takes_names_of_5(toy_base, tmp_path):
    config = LoraConfig(r=2, target_modules=[LAYER], rank_pattern={LAYER: 3})
    folder = write_lora(tmp_path / "adapter", toy_base, "text_encoder", config=config)
    rename(folder, lambda key: key.replace(".text_model.", "."))
    encoder = load_base(str(toy_base)).text_encoder
    encoder = getattr(encoder, "text_model", encoder)
    stored = read_adapter(folder, torch.nn.ModuleDict({"text_model": encoder}))
    assert set(stored.tensors) == {f"{BEFORE}text_model.{LAYER}.lora_{matrix}.weight" for matrix in "AB"}
    assert stored.config.target_modules == {f"text_model.{LAYER}"}
    assert stored.config.rank_pattern == {f"text_model.{LAYER}": 3}
