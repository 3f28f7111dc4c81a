"""Activating, enabling, disabling and deleting the adapters of a layer, even in a forward pass, and which of their
parameters train."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class SwitchingLayer(BaseTunerLayer):
    """As in peft, but disabling and enabling adapters leaves frozen what was frozen."""

    def __init__(self) -> None:
        self._disable_adapters = False
        # Which parameters trained before the adapters were disabled, (kind, adapter) -> bool. None: they are enabled,
        # or others have been made active since.
        self.trained_before: dict[tuple[str, str], bool] | None = None

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables the adapters. Nothing of them trains while they are disabled, and what was frozen before
        is frozen after."""
        if not enabled and not self._disable_adapters:
            trained = {key: parameter.requires_grad for key, parameter in self._named_adapter_parameters()}
            super().enable_adapters(False)
            self.trained_before = trained
        elif enabled and self._disable_adapters:
            for key, parameter in self._named_adapter_parameters():
                parameter.requires_grad_((self.trained_before or {}).get(key, parameter.requires_grad))
            self.trained_before, self._disable_adapters = None, False
        self.solved.change(self)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, in this order, which train unless `inference_mode` is True."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.trained_before = None
        self.solved.change(self)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Has adapters train, or not."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        if self.trained_before is not None:
            now = {key: parameter.requires_grad for key, parameter in self._named_adapter_parameters()}
            self.trained_before.update({key: trains for key, trains in now.items() if key[1] in names})

    def _named_adapter_parameters(self) -> list[tuple[tuple[str, str], nn.Parameter]]:
        return [
            ((kind, name), parameter)
            for kind in self.adapter_layer_names
            for name, parameter in getattr(self, kind).items()
        ]

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, and the rotated weight that was made with it."""
        super().delete_adapter(adapter_name)
        self.rotated_weight.forget()
        self.solved.change(self)
