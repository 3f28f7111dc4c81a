"""A folder with adapters: a run's, one of its checkpoints, or one in peft's format; and which base they belong to."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig

from finetuning.adapters.adapter import ADAPTER_WEIGHTS
from finetuning.adapters.stored import ADAPTER_CONFIG, plain_name, read_config, read_tensors, split_key
from finetuning.errors import InputError
from finetuning.models.pipeline_folder import MIRRORS
from finetuning.run_folder import CONFIG
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.fields import value_faults
from finetuning.settings.yaml_file import read_yaml

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
SHARED = (  # of a repository on the hub: adapters, a hint encoder, a ControlNet
    CONFIG,
    f"*{ADAPTER_CONFIG}",
    f"*{ADAPTER_WEIGHTS}",
    "hint_encoder/*",
    "config.json",
    "diffusion_pytorch_model.safetensors",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_run_config(run: Path) -> dict:
    """The resolved configuration of a run.

    Raises:
        InputError: the folder is not a run's output, or the configuration has been damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"{run}: not the output of a training run (it has no {CONFIG}); give a run's --output_dir")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    faults = value_faults((DreamBoothConfig, ControlNetConfig), content if isinstance(content, dict) else {})
    if not isinstance(content, dict) or not isinstance(content.get("pretrained_model_name_or_path"), str) or faults:
        said = "; ".join(faults) or "it does not name pretrained_model_name_or_path"
        raise InputError(f"{path}: is not the configuration of a run ({said})")
    return content


def local_folder(path: str | Path) -> Path:
    """The folder itself, or a hub repository's adapters and controls in the cache.

    Raises:
        InputError: a file, not there, or not to be had.
    """
    folder = Path(path)
    if folder.suffix in PICKLES and not folder.is_dir():
        raise InputError(
            f"{path}: a pickle file, which can run any code when it is read; give a folder with safetensors"
        )
    if folder.is_file():
        raise InputError(
            f"{path}: is a file; give the folder of a run. (A LoRA file of other tools: pipeline.load_lora_weights)"
        )
    if folder.is_dir():
        return folder
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise InputError(f"{path}: no such folder, and not the form owner/name of a repository on the hub")
    try:
        return Path(snapshot_download(str(path), allow_patterns=SHARED))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: no such folder, and not loaded from the hub; check the name and the network. "
            f"The library says: {text}"
        ) from error


def adapter_sources(folder: Path) -> dict[str | None, Path]:
    """{part: folder in peft's format} of a run or a checkpoint; {None: folder} of one in peft's format itself.

    Raises:
        InputError: it holds no adapter.
    """
    found = {part: folder / part for part in PARTS if (folder / part / ADAPTER_CONFIG).is_file()}
    if not found and (folder / ADAPTER_CONFIG).is_file():
        found = {None: folder}
    if not found:
        if (folder / "model_index.json").is_file():
            raise InputError(f"{folder}: is a whole pipeline, not an adapter; load it as the base")
        raise InputError(
            f"{folder}: holds no adapter ({ADAPTER_CONFIG} in it, in {' or in '.join(PARTS)}); has the run ended?"
        )
    return found


def find_parts(folder: Path, modules: Mapping[str, torch.nn.Module]) -> dict[str, Path]:
    """{part: folder in peft's format} of what a path holds.

    Args:
        modules: denoiser and text encoders, by whose layers a folder without parts is told to be of one of them.

    Raises:
        InputError: no adapter, one that is not stored as safetensors or that cannot be given a strength, or one for a
            part that is not among the modules.
    """
    found = adapter_sources(folder)
    for source in found.values():
        if not (source / ADAPTER_WEIGHTS).is_file():
            pickles = [p.name for p in source.iterdir() if p.suffix in PICKLES]
            if pickles:
                raise InputError(
                    f"{source}: has {pickles[0]}, a pickle file, which can run any code when it is read; "
                    "save the adapter as safetensors"
                )
            raise InputError(f"{source}: has no {ADAPTER_WEIGHTS}; is it complete?")
        read_config(source)
        keys = read_tensors(source).keys()
    if None in found:  # a bare folder says by its keys what it is for
        layers = {split_key(key)[0] for key in keys}
        names = {part: {plain_name(name) for name, _ in module.named_modules()} for part, module in modules.items()}
        found = {max(names, key=lambda part: len(names[part] & layers)): folder}
    if absent := [part for part in found if part not in modules]:
        raise InputError(f"{folder}: adapts the {absent[0]}, and the pipeline has none")
    return found


def run_of(folder: Path) -> Path | None:
    """The run's folder, if this is one, or one of its checkpoints or parts."""
    return next((place for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)


def trained_on(folder: Path) -> str | None:
    """The base that an adapter was trained on, as the run or peft has noted it; None = nobody has."""
    if run := run_of(folder):
        return load_run_config(run).get("pretrained_model_name_or_path")
    for place in (folder, *(folder / part for part in PARTS)):
        if (place / ADAPTER_CONFIG).is_file():
            return PeftConfig.from_pretrained(str(place)).base_model_name_or_path
    return None


def check_same_base(present: str | None, trained_on: str | None, folder: Path) -> None:
    """Refuse an adapter that was trained on another base. Where nobody has noted which, its shapes decide.

    Raises:
        InputError: with both names.
    """
    if trained_on is None or present is None or _is_same_model(trained_on, present):
        return
    raise InputError(
        f"{folder}: was trained on {trained_on}, the pipeline is {present}. Load that base; or, if they are the same "
        "or the adapter is meant for both, say so: check_base=False (--any_base)"
    )


def _is_same_model(a: str, b: str) -> bool:
    a, b = (MIRRORS.get(name, name) for name in (a, b))
    if a == b:
        return True
    left, right = Path(a), Path(b)
    if not (left.is_dir() and right.is_dir()):
        return False
    parts = [part for part in PARTS if (left / part).is_dir() or (right / part).is_dir()]
    return left.samefile(right) or all(_has_same_weights(left / part, right / part) for part in parts)


def _has_same_weights(left: Path, right: Path) -> bool:
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (left, right)]
    return bool(names[0]) and names[0] == names[1] and not any(filecmp.cmpfiles(left, right, names[0], False)[1:])
