"""The precision in which exported numbers are stored, and what rounding to it loses."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def rounding_loss(precision: str) -> list[str]:
    """What is lost in words, for a precision of DTYPES; nothing for fp32, in which adapters are computed."""
    return [] if precision == "fp32" else [f"rounding to {precision}: relative 1e-3 (fp16) or 1e-2 (bf16) a weight"]
