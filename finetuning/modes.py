"""Evaluation mode of modules for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode for as long as the block lasts; each submodule gets back the mode it had."""
    modes = {m: m.training for module in modules for m in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
