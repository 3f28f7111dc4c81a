"""Other adapters on a UNet, beside which this project's is measured.

Each takes a UNet and names of targets, and returns the model to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

NO_SIZE = {"boft_block_size": 0}  # peft's default is 4; either size or number of blocks is given


def frozen(unet: nn.Module, targets: list[str]) -> nn.Module:
    return unet


def lora(unet: nn.Module, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, LoraModel

    return LoraModel(unet, LoraConfig(r=16, target_modules=targets), "default")


def oft(unet: nn.Module, targets: list[str]) -> nn.Module:
    from peft import OFTConfig, OFTModel

    return OFTModel(
        unet, OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True, target_modules=targets), "default"
    )


def stock_boft(m: int, **size) -> Callable:
    """peft's own BOFT. Without a CUDA compiler it silently trains m = 1, so that for m > 1 its missing kernel, a
    batched block_diag, is replaced by the plain operation that it stands for."""

    def wrap(unet: nn.Module, targets: list[str]) -> nn.Module:
        import peft.tuners.boft.layer as stock

        config = stock.BOFTConfig(**(NO_SIZE | size), boft_n_butterfly_factor=m, target_modules=targets)
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


def lycoris_boft(unet: nn.Module, targets: list[str]) -> nn.Module:
    """LyCORIS rotates the outputs, always at full depth; pairs of 5 are what the widths of this UNet allow."""
    from lycoris.modules.boft import ButterflyOFTModule

    modules = [(name, module) for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    adapters = nn.ModuleList()
    for name, module in modules:
        if any(name.endswith(f".{target}") for target in targets):
            adapter = ButterflyOFTModule(name.replace(".", "_"), module, lora_dim=10, rescaled=True)
            adapter.apply_to()
            adapters.append(adapter)
    unet.lycoris = adapters
    return unet
