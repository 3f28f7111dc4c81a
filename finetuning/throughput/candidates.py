"""Adapters that are measured side by side: peft's own and this project's. Each takes a model and target names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

REFERENCE = "LoRA r=16 (peft)"
NO_SIZE = {"boft_block_size": 0}  # peft's default is 4; either size or number of blocks is given


def frozen(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
    """The model itself."""
    return unet


def lora(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
    """peft's LoRA of rank 16, which the others are compared with."""
    from peft import LoraConfig, LoraModel

    return LoraModel(unet, LoraConfig(r=16, target_modules=list(targets)), "default")


def oft(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
    """peft's OFT in its second form: blocks of 32, by a Neumann series in the place of inverses."""
    from peft import OFTConfig, OFTModel

    return OFTModel(
        unet, OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True, target_modules=list(targets)), "default"
    )


def stock_boft(m: int, **size) -> Callable:
    """peft's own BOFT. Without a CUDA compiler it silently trains m = 1, so that for m > 1 its missing kernel, a
    batched block_diag, is replaced by the plain operation that it stands for."""

    def wrap(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
        import peft.tuners.boft.layer as stock

        config = stock.BOFTConfig(**(NO_SIZE | size), boft_n_butterfly_factor=m, target_modules=list(targets))
        if m > 1:
            stock.get_fbd_cuda = lambda: True
            stock.FastBlockDiag.apply = staticmethod(
                lambda Q: torch.stack([torch.block_diag(*factor) for factor in Q])
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its failed attempts to compile
            from peft.tuners.boft import BOFTModel

            return BOFTModel(unet, config, "default")

    return wrap


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


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What learns."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
