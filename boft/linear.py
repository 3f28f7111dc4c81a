"""BOFT on linear layers: on activations or on the weight, whichever costs less."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, Conv1D
from torch import Tensor, nn

from boft.base_layer import has_hooks
from boft.functional import linear_reference, rotated_linear, scale_output
from boft.layer import BOFTLayer, compute_dtype, mixes_dtypes
from boft.rotation import apply_blocks, dtype_of_products


class Linear(nn.Module, BOFTLayer):
    """BOFT on a linear layer: nn.Linear, transformers' `Conv1D`, or a quantized linear."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs) -> None:
        nn.Module.__init__(self)
        self.fan_in_fan_out = config.fan_in_fan_out
        self.in_features, self.out_features = linear_features(base_layer)
        BOFTLayer.__init__(self, base_layer, adapter_name, config, **kwargs)

    @staticmethod
    def rotated_features(base_layer: nn.Module) -> int:
        """d, the input features."""
        return linear_features(base_layer)[0]

    def scale_shape(self) -> tuple[int, int]:
        return (self.out_features, 1)

    def _as_rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    def _from_rows(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous() if self.fan_in_fan_out else weight

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., d) -> (..., o), in the dtype of x."""
        solution = self.solved.find(self)
        if kwargs or solution is None or solution.disabled or self.merged:  # merged perhaps since the hook ran
            return BOFTLayer.forward(self, x, *args, **kwargs)
        weight, dtype = solution.current_weight(), compute_dtype(x)
        if weight is not None and not mixes_dtypes(x, weight) and self.base_is_plain():
            return self.product_with(x, weight).to(x.dtype)
        product = solution.product if solution.is_shared() else None
        if product is not None and product[0].dtype == dtype_of_products(dtype, x.device):
            # What the rest would come to, looked up by the hook:
            blocks, W, s, bias, R = product
            bias = None if bias is None else bias.to(dtype)
            y = rotated_linear(x.to(dtype), blocks, W.to(dtype), s, bias, divides=solution.divides, R=R)
            return y.to(x.dtype)
        return BOFTLayer.forward(self, x, *args, **kwargs)

    def differentiable(self, x: Tensor, adapters: list[str]) -> Tensor:
        """The output of a plain base layer, with gradients."""
        base = self.get_base_layer()
        dtype = compute_dtype(x)
        x, W = x.to(dtype), self._as_rows(base.weight).to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        for name in reversed(adapters[1:]):  # y = x B(a2) B(a1): the last one first
            x = apply_blocks(x, self.blocks_for(name, dtype))
        blocks, s = self.blocks_for(adapters[0], dtype), self.scales(adapters)
        if W.requires_grad:
            return linear_reference(x, blocks, W, s, bias)
        return rotated_linear(x, blocks, W, s, bias, divides=self.divides())

    def product(self, blocks: Tensor, s: Tensor, R: Tensor) -> tuple | None:
        base = self.base_layer
        if not self.base_is_plain() or (W := base.weight).requires_grad:
            return None
        return blocks, self._as_rows(W), s, base.bias, R if R.shape[0] == 1 else None

    def through_base_layer(self, x: Tensor, adapters: list[str], *args, **kwargs) -> Tensor:
        if self.quantization_backend is None and not isinstance(self.base_layer, BaseTunerLayer):
            return BOFTLayer.through_base_layer(self, x, adapters, *args, **kwargs)
        # Quantized, or with an adapter of another method, on top of which this one rotates.
        z = x.to(compute_dtype(x))
        for name in reversed(adapters):
            z = apply_blocks(z, self.blocks_for(name, z.dtype))
        u = self.base_layer(z, *args, **kwargs)
        bias = self.get_base_layer().bias
        return scale_output(u, self.scales(adapters).flatten(), None if bias is None else bias.to(u.dtype))

    def product_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product with a weight in the place of the base layer's, in the dtype of x, or in that of autocast."""
        bias = self.get_base_layer().bias
        if mixes_dtypes(x, weight):
            weight = weight.to(x.dtype)
        if bias is not None and mixes_dtypes(x, bias):
            bias = bias.to(x.dtype)
        if self.fan_in_fan_out:  # as transformers' Conv1D does it
            return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], self.out_features)
        return F.linear(x, weight, bias)

    def base_is_plain(self) -> bool:
        """Whether the base layer is no more than a product with its weight."""
        base = self.base_layer
        return (
            self.quantization_backend is None
            and type(base).forward in (nn.Linear.forward, Conv1D.forward)
            and not has_hooks(base)
        )

    def standard_forward(self) -> Callable:
        """The forward of which `differentiable` is the adapted form."""
        return Conv1D.forward if is_conv1d(self.base_layer) else nn.Linear.forward


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`, a linear layer that stores its weight as (in, out)."""
    return isinstance(layer, Conv1D)


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer of any kind."""
    if is_conv1d(layer):
        return tuple(layer.weight.shape)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if hasattr(layer, names[0]):
            return tuple(getattr(layer, name) for name in names)
    raise TypeError(f"{type(layer).__name__} has no in_features")
