"""This project's adapter among those that are measured; the others are in neighbours.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from finetuning.studies.throughput.neighbours import NO_SIZE, Wrap

REFERENCE = "LoRA r=16 (peft)"  # which the others are compared with


def ours(m: int, train_scale: bool = True, **size: int) -> Wrap:
    """This project's BOFT.

    Args:
        m: the number of butterfly factors.
        train_scale: whether the scale s is trained.
        size: boft_block_size or boft_block_num.

    Returns:
        A function that puts the adapter on a model, see neighbours.py.
    """

    def wrap(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
        from boft import BOFTConfig, BOFTModel

        sizes: dict[str, Any] = {**NO_SIZE, **size}
        config = BOFTConfig(
            **sizes,
            boft_n_butterfly_factor=m,
            boft_train_scale=train_scale,
            target_modules=list(targets),
        )
        return BOFTModel(unet, config, "default")

    return wrap
