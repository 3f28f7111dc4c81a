"""What a machine has: versions of packages, the device, and compilers."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from finetuning.errors import InputError

NEEDED = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "huggingface_hub",
    "numpy", "Pillow", "PyYAML", "tqdm",
)  # fmt: skip
UNUSED = (
    "wandb", "tensorboard", "datasets", "opencv-python-headless", "matplotlib", "gradio", "bitsandbytes",
)  # fmt: skip


def packages(constraints: Path) -> list[str]:
    """A line for each package that is needed: its version, and the tested versions where it is none of them.

    Args:
        constraints: constraints.txt, which lists the tested versions.

    Raises:
        InputError: if packages are missing; it names them.
    """
    tested = tested_versions(constraints)
    there = {name: found for name in NEEDED if (found := installed(name)) is not None}
    if missing := [name for name in NEEDED if name not in there]:
        raise InputError(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)} -c constraints.txt")
    lines = [f"Python {platform.python_version()}"]
    for name, found in there.items():
        expected = tested.get(name.lower(), [])
        is_tested = not expected or found.split("+")[0] in expected
        lines.append(f"{name} {found}" + ("" if is_tested else f" (tested: {', '.join(expected)})"))
    absent = [name for name in UNUSED if installed(name) is None]
    return [*lines, f"not there, not needed: {', '.join(absent)}"] if absent else lines


def installed(name: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def tested_versions(constraints: Path) -> dict[str, list[str]]:
    """{name of a package in small letters: its tested versions, one for each range of Python}."""
    found: dict[str, list[str]] = {}
    for line in constraints.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.split("#")[0].partition("==")
        if rest:
            found.setdefault(name.strip().lower(), []).append(rest.split(";")[0].strip())
    return found


def device(kind: str) -> dict[str, object]:
    """Describe the device that torch sees, and what compiling for it needs. Imports torch.

    Args:
        kind: "cuda" or "cpu".

    Raises:
        InputError: if kind is "cuda" and torch sees no GPU.
    """
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device=cuda: torch {torch.__version__} sees no CUDA GPU here; run it where nvidia-smi lists one, or "
            "rehearse with --device=cpu --tiny"
        )
    found: dict[str, object] = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if kind == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {
            "device": card.name,
            "memory_gib": card.total_memory / 2**30,
            "compute_capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        found["device"] = platform.processor() or platform.machine()
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    found |= {
        "triton": installed("triton"),
        "c_compiler": next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None),
        "nvcc": shutil.which("nvcc"),
        "python_headers": headers,
        "system": f"{platform.system()} {platform.release()}, Python {sys.version.split()[0]}",
    }
    return found
