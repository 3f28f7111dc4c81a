"""Reading one adapter in peft's format: its settings, and its tensors under the names of the module that it is for.

Names of layers differ: those of text encoders begin with `text_model.` in transformers 4 and not in 5, and
torch.compile inserts `_orig_mod.`. Adapters that are more than a rotation or a product of two matrices are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import PeftType
from safetensors.torch import load_file

from finetuning.adapters.adapter import ADAPTER_WEIGHTS
from finetuning.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
KINDS = {PeftType.BOFT: "BOFT", PeftType.LORA: "LoRA"}
PREFIX = "base_model.model."
LARGEST = 1e8  # absolute value of a number in an adapter: far above what training gives, and its powers are finite
# Settings of LoRA that leave the layer W + scale · B A, or that concern training alone.
PLAIN_LORA = {
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias", "init_lora_weights",
    "inference_mode", "revision", "base_model_name_or_path", "peft_type", "peft_version", "task_type", "auto_mapping",
    "eva_config", "megatron_core", "runtime_config",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # initializations that do not change the base
TITLES = {  # of settings, for messages
    "use_dora": "DoRA",
    "lora_bias": "LoRA with biases of its own",
    "modules_to_save": "replaces whole modules",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on single parameters",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
}
TENSORS = {  # parts of tensors' names, and what they are of
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on an embedding",
    "lora_B.bias": "LoRA with biases of its own (lora_bias)",
    "token_adapter": "trained tokens (trainable_token_indices)",
    "modules_to_save": "replaces whole modules (modules_to_save)",
}


@dataclass
class StoredAdapter:
    """An adapter as it is stored in a folder, with the names of the module that it is for.

    Attributes:
        config: its settings, as peft keeps them.
        tensors: of peft's layers, under peft's names, e.g. base_model.model.(layer).boft_R.
        biases: {layer: trained bias}.
    """

    config: PeftConfig
    tensors: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]


def read_adapter(source: Path, module: torch.nn.Module) -> StoredAdapter:
    """Read an adapter, with the names that its layers have in `module`. Names that the module lacks are kept.

    Args:
        source: a folder in peft's format.

    Raises:
        InputError: it cannot be read, or is of a kind that cannot be given a strength; names the setting.
    """
    config: Any = read_config(source)  # of BOFT or LoRA
    stored = read_tensors(source)
    actual = {plain_name(name): name for name, _ in module.named_modules()}
    tensors, biases = {}, {}
    for key, tensor in stored.items():
        layer, tail = split_key(key)
        layer = actual.get(layer, layer)
        if tail == "bias":
            biases[layer] = tensor
        else:
            tensors[f"{PREFIX}{layer}.{tail}"] = tensor
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        if given := getattr(config, field, None):
            setattr(config, field, _renamed(given, actual))
    if config.peft_type == PeftType.LORA:
        config.init_lora_weights = True  # whatever it began from is overwritten
    return StoredAdapter(config, tensors, biases)


def read_tensors(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder in peft's format, under the names that they have there.

    Raises:
        InputError: they cannot be read, are damaged, or belong to more than a rotation or a product of two matrices.
    """
    path = source / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    for key in tensors:
        if title := next((title for part, title in TENSORS.items() if part in key), None):
            raise InputError(_refusal(source, title, f"see {key}"))
    check_tensors(tensors, path)
    return tensors


def check_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Check that there are tensors and that their numbers are finite and not above LARGEST.

    Raises:
        InputError: they are not; names the first such tensor.
    """
    if not tensors:
        raise InputError(f"{path}: holds no tensors; is it complete?")
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.double().abs().max() < LARGEST:
            raise InputError(f"{path}: {name} holds numbers that are not finite or above {LARGEST:g}; it is damaged")


def read_config(source: Path) -> PeftConfig:
    """The settings of a folder in peft's format.

    Raises:
        InputError: they cannot be read, are of another method than BOFT and LoRA, or of a variant of LoRA that is more
            than the product of two matrices.
    """
    try:
        given = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        config = PeftConfig.from_pretrained(str(source))
    except Exception as error:
        raise InputError(
            f"{source / ADAPTER_CONFIG}: cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    if config.peft_type not in KINDS:
        raise InputError(f"{source}: is {config.peft_type}; BOFT and LoRA adapters can be loaded")
    if given.get("modules_to_save"):
        raise InputError(f"{source}: replaces whole modules (modules_to_save), which cannot be given a strength")
    if config.peft_type == PeftType.LORA:
        _check_plain_lora(source, given)
    return config


def _check_plain_lora(source: Path, given: Mapping[str, object]) -> None:
    """Raises InputError unless a LoRA's settings say that it adds a product of two matrices to an unchanged base."""
    if (start := given.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise InputError(
            f"{source}: init_lora_weights={start!r} has changed the base before training, so that neither strength 0 "
            "nor unloading would be the base. Convert it to a plain LoRA where it was trained: peft's "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    usual = LoraConfig().to_dict()
    for key, value in given.items():
        is_switch = isinstance(value, (bool, list, dict, str))  # a number of a newer peft may be its usual one
        if key in PLAIN_LORA or not value or (key in usual and value == usual[key]):
            continue
        if key in usual or (is_switch and not isinstance(value, str)):
            raise InputError(_refusal(source, TITLES.get(key, key), f"{key}={json.dumps(value)[:60]}"))


def _refusal(source: Path, what: str, where: str) -> str:
    return (
        f"{source}: {what} ({where}) is more than a rotation or a product of two matrices, and would be drawn and "
        "exported wrongly here. Put it into the weights with stock peft (PeftModel.from_pretrained(…)"
        ".merge_and_unload()), save that pipeline and load it as the base"
    )


# Names


def plain_name(name: str) -> str:
    """A module's name without `_orig_mod`, peft's prefix, and `text_model` at its beginning."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts[1:] if parts[0] == "text_model" else parts) if parts else ""


def split_key(key: str) -> tuple[str, str]:
    """The plain name of the layer that a tensor belongs to, and the tensor's name in it: boft_R, lora_A.weight …"""
    if found := re.search(r"\.(boft_|lora_)", key):
        return plain_name(key[: found.start()]), key[found.start() + 1 :]
    layer, _, tail = key.rpartition(".")
    return plain_name(layer.removesuffix(".base_layer")), tail


def _renamed(given: str | Iterable[str] | Mapping[str, object], actual: Mapping[str, str]) -> Any:
    """Names, endings or a pattern of names in a configuration, translated to those that the module has.

    Args:
        actual: {plain name: name in the module}.
    """
    if isinstance(given, str):
        return _matching(given, actual)
    names = {name: actual.get(plain_name(name), name.replace("_orig_mod.", "")) for name in given}
    if isinstance(given, Mapping):
        return {names[name]: value for name, value in given.items()}
    return set(names.values())


def _matching(pattern: str, actual: Mapping[str, str]) -> str | set[str]:
    """The pattern itself if it matches a name of the module, else the names that it matches as others write them."""
    if any(re.fullmatch(pattern, name) for name in actual.values()):
        return pattern
    starts = ("", "text_model.", "_orig_mod.")
    names = {name for plain, name in actual.items() if any(re.fullmatch(pattern, f"{s}{plain}") for s in starts)}
    return names or pattern
