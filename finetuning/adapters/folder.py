"""Folders that hold adapters: a run's, a checkpoint's, or one in peft's format; and the base they were trained on."""

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
from finetuning.settings.reading import value_faults
from finetuning.settings.yaml_file import read_yaml

ADAPTABLE_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # of a pipeline
DOWNLOADED = [  # patterns of the files that are wanted of a repository on the hub: adapters and controls
    CONFIG,
    f"*{ADAPTER_CONFIG}",
    f"*{ADAPTER_WEIGHTS}",
    "hint_encoder/*",
    "config.json",
    "diffusion_pytorch_model.safetensors",
]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_run_config(run: Path) -> dict:
    """The settings of a run, {name: value}, with everything that was left to the trainer filled in.

    Raises:
        InputError: the folder is not a run's output, or its configuration has been damaged.
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
    """The folder itself, or the folder in the cache into which adapters and controls of a hub repository are loaded.

    Args:
        path: a folder, or the name owner/name of a repository on the hub.

    Raises:
        InputError: it is a file, there is no such folder, or the hub cannot be reached or has no such repository.
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
        return Path(snapshot_download(str(path), allow_patterns=DOWNLOADED))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: no such folder, and not loaded from the hub; check the name and the network. "
            f"The library says: {text}"
        ) from error


def adapter_sources(folder: Path) -> dict[str | None, Path]:
    """The folders in peft's format that a folder holds: {part: folder}, or {None: folder} if it is one itself.

    Raises:
        InputError: it holds no adapter.
    """
    found: dict[str | None, Path] = {}
    found |= {part: folder / part for part in ADAPTABLE_PARTS if (folder / part / ADAPTER_CONFIG).is_file()}
    if not found and (folder / ADAPTER_CONFIG).is_file():
        found = {None: folder}
    if not found:
        if (folder / "model_index.json").is_file():
            raise InputError(f"{folder}: is a whole pipeline, not an adapter; load it as the base")
        raise InputError(
            f"{folder}: holds no adapter ({ADAPTER_CONFIG} in it, in {' or in '.join(ADAPTABLE_PARTS)}); "
            "has the run ended?"
        )
    return found


def find_parts(folder: Path, modules: Mapping[str, torch.nn.Module]) -> dict[str, Path]:
    """The folders in peft's format that a folder holds, {part: folder}.

    Args:
        modules: denoiser and text encoders, by whose layers a folder without parts is told to be of one of them.

    Raises:
        InputError: the folder holds no adapter, or one that is not stored as safetensors, that cannot be given a
            strength, or that is for a part which is not among the modules.
    """
    sources = adapter_sources(folder)
    for source in sources.values():
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
    found = {part: source for part, source in sources.items() if part is not None}
    if not found:  # the keys in the folder say which part it is for
        layers = {split_key(key)[0] for key in keys}
        names = {part: {plain_name(name) for name, _ in module.named_modules()} for part, module in modules.items()}
        found = {max(names, key=lambda part: len(names[part] & layers)): folder}
    if absent := [part for part in found if part not in modules]:
        raise InputError(f"{folder}: adapts the {absent[0]}, and the pipeline has none")
    return found


def run_of(folder: Path) -> Path | None:
    """The run's folder, if `folder` is one, or one of its checkpoints or parts; None = it is neither."""
    return next((place for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)


def trained_on(folder: Path) -> str | None:
    """The name of the base that an adapter was trained on; None = neither the run nor peft has noted it."""
    if run := run_of(folder):
        return load_run_config(run).get("pretrained_model_name_or_path")
    for place in (folder, *(folder / part for part in ADAPTABLE_PARTS)):
        if (place / ADAPTER_CONFIG).is_file():
            return PeftConfig.from_pretrained(str(place)).base_model_name_or_path
    return None


def check_same_base(present: str | None, trained_on: str | None, folder: Path) -> None:
    """Check that an adapter belongs to the base it is loaded on. If one of the names is unknown, nothing is checked.

    Args:
        present: name of the base; trained_on: of the one that the adapter was trained on.
        folder: of the adapter, for the error.

    Raises:
        InputError: they are different models; names both.
    """
    if trained_on is None or present is None or _is_same_model(trained_on, present):
        return
    raise InputError(
        f"{folder}: was trained on {trained_on}, the pipeline is {present}. Load that base; or, if they are the same "
        "or the adapter is meant for both, say so: check_base=False (--any_base)"
    )


def _is_same_model(a: str, b: str) -> bool:
    """Whether two names mean the same model: mirrors on the hub, or folders with the same weights."""
    a, b = (MIRRORS.get(name, name) for name in (a, b))
    if a == b:
        return True
    left, right = Path(a), Path(b)
    if not (left.is_dir() and right.is_dir()):
        return False
    parts = [part for part in ADAPTABLE_PARTS if (left / part).is_dir() or (right / part).is_dir()]
    return left.samefile(right) or all(_has_same_weights(left / part, right / part) for part in parts)


def _has_same_weights(left: Path, right: Path) -> bool:
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (left, right)]
    return bool(names[0]) and names[0] == names[1] and not any(filecmp.cmpfiles(left, right, names[0], False)[1:])
