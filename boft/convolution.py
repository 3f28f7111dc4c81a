"""BOFT on two-dimensional convolutions: on the filters, or on patches where these are smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from boft.base_layer import has_hooks
from boft.functional import output_size, rotated_convolution
from boft.layer import BOFTLayer, compute_dtype, mixes_dtypes
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
        solution = self.solved.find(self)
        if not (kwargs or solution is None or solution.disabled or self.merged):
            weight = solution.current_weight()
            if weight is not None and not mixes_dtypes(x, weight) and self.base_is_plain():
                return self.product_with(x, weight).to(x.dtype)
        return BOFTLayer.forward(self, x, *args, **kwargs)

    def differentiable(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """The output of a plain base layer, with gradients."""
        if self._prefers_patches(x, adapters):
            return self._through_patches(x, adapters[0])
        dtype = x.dtype if mixes_dtypes(x, self.get_base_layer().weight) else None
        return self.product_with(x, self.differentiable_weight(adapters, dtype))

    def product_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution with a weight in the place of its own, in the dtype of x, or in that of autocast."""
        base = self.get_base_layer()
        bias = base.bias
        if mixes_dtypes(x, weight):
            weight = weight.to(x.dtype)
        if bias is not None and mixes_dtypes(x, bias):
            bias = bias.to(x.dtype)
        return base._conv_forward(x, weight, bias)

    def base_is_plain(self) -> bool:
        """Whether the base layer is no more than a convolution with its weight."""
        base = self.base_layer
        return type(base).forward is nn.Conv2d.forward and is_standard(type(base)) and not has_hooks(base)

    def standard_forward(self) -> Callable | None:
        """The forward of which `differentiable` is the adapted form; None if the base layer has another."""
        return nn.Conv2d.forward if is_standard(type(self.base_layer)) else None

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


def is_standard(layer_class: type[nn.Conv2d]) -> bool:
    """Whether a class convolves as torch does, once its forward has been called."""
    return layer_class._conv_forward is nn.Conv2d._conv_forward
