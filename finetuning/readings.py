"""Copies between a GPU and the host for which the host does not wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Reading:
    """Numbers that begin their way to the host now and are read later.

    Reading a tensor at once would make the host wait until the GPU has done all its work before.

    Args:
        values: numbers, and tensors of one element, by name; all tensors are on the same device.
    """

    def __init__(self, values: Mapping[str, float | torch.Tensor]):
        self._values = dict(values)
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        self._names = list(tensors)
        self._copied: torch.cuda.Event | None = None
        if not tensors:
            return
        found = torch.stack([tensor.detach().double().reshape(()) for tensor in tensors.values()])
        if found.device.type == "cuda":
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._host.copy_(found, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = found

    def values(self) -> dict[str, float]:
        """All numbers as floats, by name; waits until they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        arrived = dict(zip(self._names, self._host.tolist())) if self._names else {}
        return {**self._values, **arrived}


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on a device. A copy to a GPU goes through pinned memory, so that the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
