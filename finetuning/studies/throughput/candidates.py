"""This project's adapter among those that are measured; the others are in neighbours.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from finetuning.studies.throughput.neighbours import NO_SIZE

REFERENCE = "LoRA r=16 (peft)"  # which the others are compared with


def ours(m: int, train_scale: bool = True, **size) -> Callable:
    """This project's BOFT. size: boft_block_size or boft_block_num."""

    def wrap(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
        from boft import BOFTConfig, BOFTModel

        config = BOFTConfig(
            **NO_SIZE | size,
            boft_n_butterfly_factor=m,
            boft_train_scale=train_scale,
            target_modules=list(targets),
        )
        return BOFTModel(unet, config, "default")

    return wrap
