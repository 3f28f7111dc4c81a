"""Other adapters, beside which this project's is measured.

Each function takes a model and the names of the layers to adapt, and returns the model to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

Wrap = Callable[[nn.Module, Sequence[str]], nn.Module]
NO_SIZE = {"boft_block_size": 0}  # peft's default is 4, and only one of size and number of blocks may be given


def frozen(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
    """The model without an adapter."""
    return unet


def lora(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
    """peft's LoRA of rank 16."""
    from peft import LoraConfig, LoraModel

    return LoraModel(unet, LoraConfig(r=16, target_modules=list(targets)), "default")


def oft(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
    """peft's OFT with blocks of 32."""
    from peft import OFTConfig, OFTModel

    config = OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True, target_modules=list(targets))
    return OFTModel(unet, config, "default")


def stock_boft(m: int, **size: int) -> Wrap:
    """peft's own BOFT with m factors. size: boft_block_size or boft_block_num.

    Without a CUDA compiler peft silently trains m = 1. For m > 1 its missing kernel, a batched block_diag, is
    therefore replaced by plain operations that compute the same.
    """

    def wrap(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
        import peft.tuners.boft.layer as stock

        sizes: dict[str, Any] = {**NO_SIZE, **size}
        config = stock.BOFTConfig(**sizes, boft_n_butterfly_factor=m, target_modules=list(targets))
        if m > 1:
            stock.get_fbd_cuda = lambda: True
            product = staticmethod(lambda Q: torch.stack([torch.block_diag(*factor) for factor in Q]))
            setattr(stock.FastBlockDiag, "apply", product)  # noqa: B010, an assignment that type checkers refuse
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns that it cannot compile its kernel
            from peft.tuners.boft import BOFTModel

            return BOFTModel(unet, config, "default")

    return wrap


def lycoris_boft(unet: nn.Module, targets: Sequence[str]) -> nn.Module:
    """LyCORIS' BOFT, which rotates outputs and always takes all factors.

    lora_dim=10, pairs of 5, is the block size that the widths of Stable Diffusion's UNet allow.
    """
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
