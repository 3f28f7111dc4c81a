"""Whether values can be asked for: not while operations are recorded or transformed instead of just computed, and not
without waiting on a GPU.

While `torch.compile`, `torch.export`, `torch.jit.trace`, `make_fx`, fake tensors, the transforms of `torch.func` or
forward-mode differentiation are at work, tensors have no values that Python could ask for, nothing may be kept from
call to call, and gradients written by hand are in the way. Everything in this package then takes plain differentiable
operations, which all of these programs understand.
"""

from __future__ import annotations

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_dispatch_mode,
    _get_tracing_state,
    _TorchDispatchModeKey,
)
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def is_traced(*tensors: torch.Tensor) -> bool:
    """Whether plain differentiable operations are called for, in general or by one of the tensors."""
    if is_compiling() or _are_functorch_transforms_active() or _get_tracing_state() is not None:
        return True
    if forward_ad._current_level >= 0 or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
        return True
    if _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:
        return True
    return FakeTensor in map(type, tensors)


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether Python can ask for values without waiting for a device."""
    return tensor.device.type == "cpu"
