"""Modes of modules that last as long as a block."""

from __future__ import annotations

from contextlib import contextmanager

import torch


@contextmanager
def evaluating(*modules: torch.nn.Module):
    """Evaluation mode for as long as the block lasts; every submodule gets back the mode that it had."""
    modes = {m: m.training for module in modules for m in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
