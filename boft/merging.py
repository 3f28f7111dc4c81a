"""Merging adapters into the base weight of a layer, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from boft.base_layer import computes_weight


class MergingLayer(BaseTunerLayer):
    """What a layer with BOFT adapters does to merge and unmerge them.

    Everything that can go wrong is found before anything is changed. The merged weight is a parameter of its own: the
    base weight is kept as it is, with all that shares it, and put back bit for bit.
    """

    def __init__(self) -> None:
        self.merged_adapters = []
        self._unmerged_weight = None  # the base weight as it was, while an adapter is merged
        self._merged_weight: Trace | None = None  # what was put in its place
        # Where else the model calls the base layer itself, as (name there, parent, name in it). Merging would change
        # these calls, too.
        self.other_places: list[tuple[str, nn.Module, str]] = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the rotated weight in the place of the base weight. Computed in float32, then cast.

        The base weight is kept beside it until `unmerge`, which puts it back bit for bit; that costs one copy of it.
        Another layer that shares the base weight goes on with the base weight.

        Args:
            safe_merge: Look for values that are not finite first.
            adapter_names: Which adapters; None = the active ones. Those that are merged already are left alone.

        Raises:
            TypeError: If nothing can be written to the base weight, because of how it is quantized, or because it is
                computed from other parameters whenever it is used.
            ValueError: If the base layer is called from another place of the model as well, or has an adapter of
                another method; with `safe_merge`, if the merged weight is not finite. The layer is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.boft_R]
        if not names:
            return
        self._check_mergeable(names)
        weight = self._weight_with([*self.merged_adapters, *names])
        if safe_merge:
            self._check_finite(weight, names)
        if not self.merged:
            self._unmerged_weight = self._keep()
        elif self.quantization_backend is not None:
            self._restore(self._unmerged_weight)
        self._put(weight)
        self._merged_weight = Trace(self.get_base_layer())
        self.merged_adapters = [*self.merged_adapters, *names]
        self.rotated_weight.forget()

    def check_merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Raises what `merge` would raise, and changes nothing."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.boft_R and name not in self.merged_adapters]
        if names:
            self._check_mergeable(names)
            if safe_merge:
                self._check_finite(self._weight_with([*self.merged_adapters, *names]), names)

    def unmerge(self) -> None:
        """Puts the base weight back, bit for bit.

        Raises:
            ValueError: If the merged weight was changed since the merge. The layer is left as it is.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_unmerge()
        self._restore(self._unmerged_weight)
        self._unmerged_weight = self._merged_weight = None
        self.merged_adapters = []

    def check_unmerge(self) -> None:
        """Raises what `unmerge` would raise, and changes nothing."""
        if self.merged and not self._merged_weight.is_still_there(self.get_base_layer()):
            raise ValueError(
                f"adapters {', '.join(map(repr, self.merged_adapters))} cannot be unmerged: the weight has been "
                "changed since they were merged (loaded, trained or assigned), which unmerging would throw away. Load "
                "or train base weights after unmerge_adapter(); to keep the weight as it is now, call unload(), which "
                "takes the adapters off"
            )

    def _check_mergeable(self, names: Sequence[str]) -> None:
        adapters, backend = f"adapter {', '.join(map(repr, names))}", self.quantization_backend
        base = self.get_base_layer()
        if backend is not None and not backend.supports_merge:
            raise TypeError(f"BOFT cannot merge into {backend.backend_name} weights; use the adapter unmerged")
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"{adapters} cannot be merged: the layer has an adapter of another method "
                f"({type(self.base_layer).__module__}), on top of which BOFT rotates. Merge and unload that one "
                "first, and load the BOFT adapter again; or use it unmerged"
            )
        if backend is None and computes_weight(base):
            raise TypeError(
                f"{adapters} cannot be merged: the weight is computed from other parameters whenever it is used "
                "(weight_norm, spectral_norm, pruning or another parametrization), so that what is written to it is "
                "lost. Make it a parameter first, with torch.nn.utils.parametrize.remove_parametrizations, "
                "prune.remove, remove_weight_norm or remove_spectral_norm, or use the adapter unmerged"
            )
        elsewhere = [path for path, parent, name in self.other_places if parent._modules.get(name) is self.base_layer]
        if elsewhere:
            raise ValueError(
                f"{adapters} cannot be merged: the model calls the same module as {', '.join(elsewhere)}, too, where "
                "it has no adapter and would be changed by the merge. Give that place a copy of the module "
                "(copy.deepcopy) first, or use the adapter unmerged"
            )
        if backend is None and base.weight.device.type == "meta":
            raise ValueError(f"{adapters} cannot be merged: the weight is on the meta device, without values. Load it")

    @staticmethod
    def _check_finite(weight: Tensor, names: Sequence[str]) -> None:
        if not torch.isfinite(weight).all():
            raise ValueError(f"adapter {', '.join(names)!r}: the merged weight is not finite, nothing was merged")

    @torch.no_grad()
    def _weight_with(self, adapters: Sequence[str]) -> Tensor:
        """The base weight as it was before any merge, so that nothing is rounded twice, with adapters in it."""
        applied = [name for name in adapters if self.scaling[name] != 0]
        with self._unmerged_base() as base:
            return self.effective_weight(applied, base) if applied else base.clone()

    @contextmanager
    def _unmerged_base(self) -> Iterator[Tensor]:
        if not self.merged:
            yield self.get_base_weight()
        elif self.quantization_backend is None:
            current = self.get_base_layer().weight
            yield self._unmerged_weight.data.to(current.device, current.dtype)
        else:
            current = self._keep()
            self._restore(self._unmerged_weight)
            try:
                yield self.get_base_weight()
            finally:
                self._restore(current)

    def _put(self, weight: Tensor) -> None:
        if self.quantization_backend is not None:
            self.set_base_weight(weight)
            return
        base = self.get_base_layer()
        replaced = base.weight
        base.weight = nn.Parameter(weight, requires_grad=replaced.requires_grad)
        vars(base.weight).update(vars(replaced))  # what others have noted on it

    def _keep(self):
        """The base weight as it is: the parameter, or the layer and all that it derives from its quantized weight."""
        base = self.get_base_layer()
        if self.quantization_backend is None:
            return Kept(base.weight)
        weight, state = getattr(base, "weight", None), getattr(base, "state", None)
        attributes = {} if weight is None else dict(vars(weight))
        return self.base_layer, weight, attributes, {} if state is None else dict(vars(state))

    def _restore(self, kept) -> None:
        if self.quantization_backend is None:
            base = self.get_base_layer()
            merged, base.weight = base.weight, kept.parameter
            if (kept.data.device, kept.data.dtype) != (merged.device, merged.dtype):  # moved or cast meanwhile
                base.weight.data = kept.data.to(merged.device, merged.dtype)
            base.weight.requires_grad_(merged.requires_grad)
            return
        self.base_layer, weight, attributes, state = kept
        if weight is not None:
            vars(weight).update(attributes)
            self.get_base_layer().weight = weight
        if state:
            vars(self.get_base_layer().state).clear()
            vars(self.get_base_layer().state).update(state)


class Kept:
    """A parameter that is not registered with the module whose attribute this is."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    @property
    def data(self) -> Tensor:
        return self.parameter.data


class Trace:
    """What a merged weight is known by later on, also after it was moved, cast or copied: the parameter with its
    version, and some of its values."""

    SAMPLES = 1024

    def __init__(self, base: nn.Module):
        weight = getattr(base, "weight", None)
        self._parameter = None if weight is None else Kept(weight)
        self._version, self._address = self._state(weight)
        self._values = None if weight is None else self._sample(weight).cpu()

    def is_still_there(self, base: nn.Module) -> bool:
        """Whether the weight of the base layer is the same, up to moves and casts."""
        weight = getattr(base, "weight", None)
        if weight is None or self._values is None:
            return weight is None and self._values is None
        version, address = self._state(weight)
        if weight is self._parameter.parameter and address == self._address and version != self._version:
            return False  # changed in place
        now, then = self._sample(weight).cpu(), self._values
        if now.shape != then.shape:
            return False
        if not then.is_floating_point():
            return torch.equal(now, then)
        through = (then.dtype, torch.bfloat16, torch.float16)  # a cast and back leaves rounded values
        casts = [then.to(dtype).to(now.dtype).double() for dtype in through]
        return any(torch.allclose(now.double(), cast, rtol=0, atol=0, equal_nan=True) for cast in casts)

    @staticmethod
    def _state(weight: Tensor | None) -> tuple:
        if weight is None or weight.is_inference():  # which has no version
            return None, None
        return weight._version, weight.data_ptr()

    @classmethod
    def _sample(cls, weight: Tensor) -> Tensor:
        values = weight.detach().reshape(-1)
        count = min(len(values), cls.SAMPLES)
        positions = torch.linspace(0, len(values) - 1, count, device=values.device, dtype=torch.float64).long()
        return values[positions]
