"""BOFT on two-dimensional convolutions: on the filters, or on patches where these are smaller."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from boft.functional import output_size, rotated_convolution, rotated_weight
from boft.layer import BOFTLayer, compute_dtype
from boft.rotation import rotate_weight
from boft.tracing import is_traced


class Conv2d(nn.Module, BOFTLayer):
    """BOFT on a convolution with any kernel, stride, padding, padding mode, dilation and groups.

    The rotated axis is the flattened filter, f = (c · kh + ky) · kw + kx with c counting the channels of one group,
    so that d = in_channels / groups · kh · kw, and the filters of all groups share the rotation.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base_layer.in_channels, base_layer.out_channels
        BOFTLayer.__init__(self, base_layer, adapter_name, config, **kwargs)

    @staticmethod
    def rotated_features(base_layer: nn.Module) -> int:
        """d, the size of a flattened filter."""
        kh, kw = base_layer.kernel_size
        return base_layer.in_channels // base_layer.groups * kh * kw

    def scale_shape(self) -> tuple[int, int]:
        return (1, self.out_features)

    def _as_rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _from_rows(self, weight: Tensor) -> Tensor:
        return weight.view(self.get_base_layer().weight.shape)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(N, C, H, W) or (C, H, W) -> the same with the convolution's output size, in the dtype of x."""
        return BOFTLayer.forward(self, x, *args, **kwargs)

    def adapted(self, x: Tensor, adapters: list[str]) -> Tensor:
        """The output with adapters that have some strength."""
        base = self.get_base_layer()
        if not (self.trains(adapters) or is_traced(x, *self.parameters_of(adapters[0]))):
            return base._conv_forward(x, self.frozen_weight(adapters), base.bias)
        self.rotated_weight.forget()
        if self._prefers_patches(x, adapters):
            return self._through_patches(x, adapters[0])
        return base._conv_forward(x, self._differentiable_weight(adapters), base.bias)

    def _prefers_patches(self, x: Tensor, adapters: Sequence[str]) -> bool:
        """Whether the output has so few positions that its patches are smaller than the filters."""
        base = self.get_base_layer()
        if len(adapters) > 1 or base.groups > 1 or x.ndim < 4 or base.weight.requires_grad:
            return False
        height, width = output_size(x, base)
        return not is_traced(x) and x.shape[0] * height * width <= self.out_features

    def _through_patches(self, x: Tensor, adapter: str) -> Tensor:
        base, dtype = self.get_base_layer(), compute_dtype(x)
        W, s = self._as_rows(base.weight).to(dtype), self.scales([adapter])
        bias = None if base.bias is None else base.bias.to(dtype)
        blocks = self.blocks_for(adapter, dtype)
        return rotated_convolution(x.to(dtype), blocks, W, s, bias, base, self.divides())

    def _differentiable_weight(self, adapters: list[str]) -> Tensor:
        base = self.get_base_layer()
        W, s = self._as_rows(base.weight), self.scales(adapters)
        if len(adapters) == 1 and not W.requires_grad:
            blocks = self.blocks_for(adapters[0], W.dtype)
            return self._from_rows(rotated_weight(blocks, W, s, self.divides()))
        for name in adapters:
            W = rotate_weight(W, self.blocks_for(name, W.dtype))
        return self._from_rows((W * s.view(-1, 1)).to(W.dtype))
