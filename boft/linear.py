"""BOFT on linear layers: on activations or on the weight, whichever costs less."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boft.functional import linear_reference, rotated_linear, scale_output
from boft.layer import BOFTLayer, compute_dtype
from boft.rotation import apply_blocks, dtype_of_products
from boft.tracing import is_traced


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
        if solution is None or solution.disabled or self.merged:  # merged perhaps since the hook ran
            return BOFTLayer.forward(self, x, *args, **kwargs)
        weight, dtype = solution.current_weight(), compute_dtype(x)
        if weight is not None and self._base_is_plain():
            return self._linear(x, weight).to(x.dtype)
        product = solution.product if solution.is_shared() else None
        if product is not None and product[0].dtype == dtype_of_products(dtype, x.device):
            # What the rest would come to, looked up by the hook:
            blocks, W, s, bias, R = product
            bias = None if bias is None else bias.to(dtype)
            y = rotated_linear(x.to(dtype), blocks, W.to(dtype), s, bias, divides=solution.divides, R=R)
            return y.to(x.dtype)
        return BOFTLayer.forward(self, x, *args, **kwargs)

    def adapted(self, x: Tensor, adapters: list[str]) -> Tensor:
        """The output with adapters that have some strength."""
        trains = self.trains(adapters)
        if trains:
            self.rotated_weight.forget()
        if not self._base_is_plain():
            y = self._through_base_layer(x, adapters)
        elif trains or is_traced(x, *self.parameters_of(adapters[0])):
            y = self._differentiable(x, adapters)
        else:
            y = self._linear(x, self.frozen_weight(adapters))
        return y

    def _differentiable(self, x: Tensor, adapters: list[str]) -> Tensor:
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
        if not self._base_is_plain() or (W := base.weight).requires_grad:
            return None
        return blocks, self._as_rows(W), s, base.bias, R if R.shape[0] == 1 else None

    def _through_base_layer(self, x: Tensor, adapters: list[str]) -> Tensor:
        """For base layers that must be called: quantized ones, and those with hooks or a forward of their own."""
        z = x.to(compute_dtype(x))
        for name in reversed(adapters):
            z = apply_blocks(z, self.blocks_for(name, z.dtype))
        u = self.base_layer(z)
        bias = self.get_base_layer().bias
        return scale_output(u, self.scales(adapters).flatten(), None if bias is None else bias.to(u.dtype))

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = self.get_base_layer().bias
        if self.fan_in_fan_out:  # as transformers' Conv1D does it
            return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], self.out_features)
        return F.linear(x, weight, bias)

    def _base_is_plain(self) -> bool:
        """Whether the base layer is no more than a product with its weight."""
        base = self.base_layer
        return (
            self.quantization_backend is None
            and (type(base).forward is nn.Linear.forward or is_conv1d(base))
            and not (base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__)
        )


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`, a linear layer that stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer of any kind."""
    if is_conv1d(layer):
        return tuple(layer.weight.shape)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if hasattr(layer, names[0]):
            return tuple(getattr(layer, name) for name in names)
    raise TypeError(f"{type(layer).__name__} has no in_features")
