"""How far adapters turn a layer: settings that may change at any time, even in a forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StrengthLayer:
    """What a layer with BOFT adapters does to set strengths."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Strength α along the rotation: S → α S, s → 1 + α (s - 1). Orthogonal for every α; 0 is the base model.

        Raises:
            ValueError: If the adapter is merged, or if the strength is not finite.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = self.checked_scale(adapter, scale)
            self._settings_changed(adapter)

    def checked_scale(self, adapter: str, scale: float) -> float:
        """The strength as `set_scale` stores it; raises what it would raise."""
        self._refuse_while_merged(adapter, "set_scale")
        return finite_strength(adapter, scale)

    def set_factor_scale(self, adapter: str, scales: Sequence[float] | None) -> None:
        """Strength of each factor, B_0 first, on top of the adapter's own; None resets them.

        Zeros remove factors one by one, the paper's weight interpolation (Figure 10). s is left alone.

        Raises:
            ValueError: If the adapter is merged, if the number of values is not m, or if one is not finite.
        """
        if adapter in self.boft_R:
            self.factor_scaling[adapter] = self.checked_factor_scale(adapter, scales)
            self._settings_changed(adapter)

    def checked_factor_scale(self, adapter: str, scales: Sequence[float] | None) -> tuple[float, ...] | None:
        """The strengths as `set_factor_scale` stores them; raises what it would raise."""
        self._refuse_while_merged(adapter, "set_factor_scale")
        m = self.boft_R[adapter].shape[0]
        if scales is not None and len(scales) != m:
            raise ValueError(
                f"factor strengths {list(scales)}: adapter {adapter!r} has m={m} factors, give {m} values"
            )
        return None if scales is None else tuple(finite_strength(adapter, scale) for scale in scales)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.set_scale(adapter, self.scaling[adapter] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters; None resets it to 1."""
        if scale == 0:
            raise ValueError("unscale_layer(0) would divide by zero: call unscale_layer() to reset the strength to 1")
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.set_scale(adapter, 1.0 if scale is None else self.scaling[adapter] / scale)

    def _refuse_while_merged(self, adapter: str, what: str) -> None:
        if adapter in self.merged_adapters:
            raise ValueError(f"{what}: adapter {adapter!r} is merged; call unmerge_adapter() first")

    def _settings_changed(self, adapter: str) -> None:
        self.solved.change(self)
        self.strength_tensors.write(adapter, self.scaling[adapter], self.strengths(adapter))

    def strength(self, adapter: str) -> tuple[float, tuple[float, ...] | None]:
        """The strength of an adapter, and those of its factors on top of it: those with which the forward pass has
        begun that this call belongs to, else those of now."""
        solution = self.solved.find(self)
        if solution is not None and adapter in solution.strengths:
            return solution.strengths[adapter]
        return self.scaling[adapter], self.factor_scaling[adapter]

    def strengths(self, adapter: str) -> tuple[float, ...]:
        """Strength of each of the m factors, the adapter's own included."""
        alpha, factors = self.strength(adapter)
        return tuple(alpha * factor for factor in factors or (1.0,) * self.boft_R[adapter].shape[0])


class StrengthTensors(nn.Module):
    """Strengths as tensors that a compiled graph reads, so that another strength needs no other graph.

    They follow the model from device to device, keep their precision, and are no part of a state dict.
    """

    def __init__(self):
        super().__init__()
        self._values: dict[str, Tensor] = {}  # adapter -> (1 + m,): its strength, then that of each factor

    def write(self, adapter: str, strength: float, factors: tuple[float, ...]) -> None:
        values, old = torch.tensor([strength, *factors]), self._values.get(adapter)
        if old is None or old.shape != values.shape:
            self._values[adapter] = values if old is None else values.to(old.device)
        else:
            old.copy_(values)  # in place: graphs have it as an input

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._values

    def __delitem__(self, adapter: str) -> None:
        del self._values[adapter]

    def of_scales(self, adapter: str, like: Tensor) -> Tensor:
        """The strength for s, on the device and in the dtype of a tensor, ()."""
        return self._values[adapter][0].to(like)

    def of_factors(self, adapter: str, like: Tensor) -> Tensor:
        """The strengths of the factors for R, (m, 1, 1, 1)."""
        return self._values[adapter][1:].view(-1, 1, 1, 1).to(like)

    def _apply(self, fn, recurse=True):
        for adapter, values in self._values.items():
            device = fn(values).device
            if device.type != "meta":
                self._values[adapter] = values.to(device)
        return super()._apply(fn, recurse)


def finite_strength(adapter: str, strength: float) -> float:
    """A strength as a float. Raises ValueError if it is not finite."""
    if not math.isfinite(strength):
        raise ValueError(f"strength {strength} of adapter {adapter!r} must be a finite number")
    return float(strength)
