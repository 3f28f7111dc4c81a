"""Numbers on their way from a GPU to the host, which does not wait for them, and tensors on the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Reading:
    """Numbers that are read later than they are asked for.

    Args:
        values: Numbers, and tensors of one element on one device, by name. Reading a tensor at once would have the
            host wait for all that the GPU still has to do before.
    """

    def __init__(self, values: Mapping[str, float | torch.Tensor]):
        self._values = dict(values)
        self._names = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
        self._copied: torch.cuda.Event | None = None
        if not self._names:
            return
        found = torch.stack([values[name].detach().double().reshape(()) for name in self._names])
        if found.device.type == "cuda":
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._host.copy_(found, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = found

    def values(self) -> dict[str, float]:
        """All of them as plain numbers; waits until they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        read = dict(zip(self._names, self._host.tolist())) if self._names else {}
        return {**self._values, **read}


def onto(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the host on a device. The host does not wait for a GPU: the copy goes through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
