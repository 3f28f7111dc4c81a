"""What a layer remembers: the rotation that its model has solved for a forward pass, and the rotated weight while
nothing trains.

Both are derived from the parameters and can be made again, so that copies and pickles of a model start without them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

from boft.functional import has_saved_tensors_hooks
from boft.tracing import is_on_host

SETTINGS = threading.RLock()  # held while strengths or active adapters of all layers change, and while they are read
LONGEST_PAST = 64  # settings that a layer remembers for backward passes that are still to come


class Forgotten:
    """An object whose copies and pickles are empty."""

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return (type(self), ())


class Moment:
    """Where a forward pass begins: in which thread, at which depth of backward passes, with or without gradients, and
    how many graph nodes its thread has made before."""

    __slots__ = ("number", "task", "thread", "with_gradients")

    def __init__(self):
        self.with_gradients, self.task = torch.is_grad_enabled(), torch._C._current_graph_task_id()
        self.thread, self.number = threading.get_ident(), torch._C._autograd._get_sequence_nr()


class Solution:
    """What one layer does in one forward pass of its model: the settings as they were when the pass began, and the
    tensors that the hook of the model has solved with them, together with those of all other layers.

    Attributes:
        adapters: The adapters that are applied, in their order.
        strengths: Of each of them, its strength and that of its factors.
        disabled: Whether the layer is its base layer.
        kept: The blocks that dropout has left, for each adapter that drops any.
        blocks: The super-blocks of each adapter.
        product: Arguments of `rotated_linear` for all calls in this pass.
        divides: Whether no scale is near 0: `functional.can_divide`.
        weight: The rotated weight that the hook has found to be current.
    """

    __slots__ = (
        "_is_reentrant", "adapters", "blocks", "disabled", "divides", "is_solved", "kept", "moment", "product",
        "strengths", "weight",
    )  # fmt: skip

    def __init__(self, layer, moment: Moment):
        scaling, factors = layer.scaling, layer.factor_scaling
        self.adapters = [name for name in layer.active_adapters if scaling.get(name)]
        self.strengths = {name: (scaling[name], factors[name]) for name in self.adapters}
        self.disabled = layer.disable_adapters
        self.kept: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}
        self.product: tuple | None = None
        self.divides = False
        self.weight: Tensor | None = None
        self.is_solved = False  # by the hook; otherwise the layer solves for itself, with these settings
        self.moment = moment
        self._is_reentrant = False

    def is_running(self) -> bool:
        """Whether the pass is at the same depth as this call: not where a backward pass within it computes anew."""
        return self.moment.task == torch._C._current_graph_task_id()

    def is_shared(self) -> bool:
        """Whether a call may use the tensors of the hook, which all calls in the pass share.

        Not in another gradient mode than that of the hook. And not where reentrant checkpointing computes a segment
        again: that graph serves one segment, and the graph of the hook could not serve several. In a recomputation
        that only looks for saved tensors, it may, and must: the first run has saved what comes of them.
        """
        if not self.is_solved or self.moment.with_gradients != torch.is_grad_enabled():
            return False
        return self.is_running() or (has_saved_tensors_hooks() and not self._is_reentrant)

    def current_weight(self) -> Tensor | None:
        """The rotated weight, if it is all that a call needs. Not if gradients were off when the hook saw that nothing
        trains, and are on now."""
        return self.weight if self.moment.with_gradients or not torch.is_grad_enabled() else None

    def note_gradient_mode(self) -> None:
        """Notes a call without gradients in a pass with gradients: reentrant checkpointing runs a segment that way
        first, and again in the backward pass."""
        self._is_reentrant |= self.moment.with_gradients and not torch.is_grad_enabled()

    def is_like(self, other: Solution) -> bool:
        """Whether both come to the same output."""
        mine, others = ((s.adapters, s.strengths, s.disabled) for s in (self, other))
        return self is other or (mine == others and not self.kept and not other.kept)

    def free(self) -> None:
        """Lets go of all tensors that can be made again."""
        self.blocks, self.product, self.weight = {}, None, None


@dataclass(slots=True)
class Span:
    """The graph nodes of a thread, by their numbers, that were made under the same settings."""

    thread: int
    first: int
    end: int | None  # None: still running
    versions: dict[str, tuple]  # of the parameters of each adapter
    solution: Solution


class _Running(threading.local):
    solution: Solution | None = None


class Solved(Forgotten):
    """The solution of the forward pass that is running in this thread, and what a backward pass needs of past ones.

    Gradient checkpointing calls layers again in the backward pass, perhaps after further forward passes with other
    strengths, other dropout, or none of the adapters. Which pass a call belongs to is known from the number of the
    graph node that is being differentiated.
    """

    def __init__(self):
        self._running = _Running()
        self._past: list[Span] = []

    @property
    def divides(self) -> bool:
        """Whether the last pass in this thread found that no scale is near 0."""
        last = self._running.solution or next((span.solution for span in reversed(self._past)), None)
        return last is not None and last.divides

    def begin(self, layer, moment: Moment) -> Solution:
        """Settings for the forward pass that begins in this thread. With gradients, they are kept for its backward
        pass."""
        solution = self._running.solution = Solution(layer, moment)
        if moment.with_gradients:
            self._remember(layer, solution)
        return solution

    def _remember(self, layer, solution: Solution) -> None:
        thread = solution.moment.thread
        versions = {name: tuple(map(version, layer.parameters_of(name))) for name in solution.adapters}
        # Parameters that have changed since cannot be differentiated at their old values any more:
        past = [span for span in self._past if is_compatible(span.versions, versions)]
        mine = [span for span in past if span.thread == thread]
        if mine and mine[-1].solution.is_like(solution):
            mine[-1].solution, mine[-1].end = solution, None
        else:
            for span in mine:
                span.solution.free()
            past.append(Span(thread, solution.moment.number, None, versions, solution))
        self._past = past[-LONGEST_PAST:]

    def end(self, moment: Moment) -> None:
        """The forward pass in this thread is over."""
        running, self._running.solution = self._running.solution, None
        if running is not None and running.moment.with_gradients:
            for span in self._past:
                if span.thread == moment.thread and span.end is None:
                    span.end = moment.number

    def change(self, layer) -> None:
        """Settings have changed. If that was in a forward pass of this thread, what the hook has solved is dropped and
        the layer solves for itself from here on. Other threads end their passes with the settings they began with."""
        if self._running.solution is not None:
            with SETTINGS:
                moment = Moment()
                self.end(moment)
                self.begin(layer, moment)

    def find(self, layer) -> Solution | None:
        """What a call of the layer is part of; None if it is called by itself.

        Raises:
            RuntimeError: If gradient checkpointing calls it, and it is not known what for.
        """
        if is_compiling():
            return None
        running = self._running.solution
        if running is not None and running.moment.task == torch._C._current_graph_task_id():
            return running
        node = torch._C._current_autograd_node() if self._past else None
        return None if node is None else self._of_node(layer, node._sequence_nr())

    def _of_node(self, layer, number: int) -> Solution | None:
        past, thread = self._past, threading.get_ident()
        # A GPU's backward pass has a thread of its own, which has run no forward pass.
        spans = [span for span in past if span.thread == thread] or past
        found = [span.solution for span in spans if span.first <= number and (span.end is None or number < span.end)]
        if found and all(found[0].is_like(other) for other in found):
            return found[-1]
        # A layer that was called by itself, or a segment within a segment: the settings are those of now, if they are
        # known to have been the same all along.
        now = Solution(layer, Moment())
        if all(now.is_like(span.solution) for span in spans):
            return None
        raise RuntimeError(
            "gradient checkpointing computes a BOFT layer again, and which forward pass it belongs to cannot be told "
            "apart: between them, strengths, active adapters or the blocks left by boft_dropout were different. Call "
            "backward() after each forward pass, or do not nest checkpointed segments"
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """A rotated weight and what it was made of."""

    weight: Tensor
    origin: tuple
    parameters: list[Tensor]  # copies on a CPU; elsewhere the tensors themselves
    base: Tensor  # an alias: while it lives, its memory cannot become another weight


class RotatedWeight(Forgotten):
    """The effective weight of a layer in which nothing trains, and what it was made of.

    It is current as long as adapters and strengths are the same, the base weight is the same tensor at the same
    version, and R and s hold the same values. On a CPU, R and s are compared by value: what is written through
    `.data`, as averages of weights are, leaves no trace in the version. On a GPU such a comparison would have Python
    wait for the result in every call. There, R and s must be the same tensors at the same version, which any operation
    in place raises, an optimizer's or `load_state_dict`'s, but not one through `.data`: after such a change, call
    `forget`. (A base weight changed through `.data`, in place, goes
    unnoticed everywhere.)
    """

    def __init__(self):
        self._kept: _Kept | None = None  # replaced as a whole: other threads may be reading

    @property
    def weight(self) -> Tensor | None:
        kept = self._kept
        return None if kept is None else kept.weight

    def keep(self, layer, adapters: Sequence[str], weight: Tensor) -> None:
        base, parameters = layer.get_base_layer().weight, self._list(layer, adapters)
        by_value = is_on_host(base)
        if base.is_inference() or (not by_value and any(parameter.is_inference() for parameter in parameters)):
            return  # these have no version
        parameters = [p.detach().clone() if is_on_host(p) else p.detach() for p in parameters]
        self._kept = _Kept(weight, self._origin(layer, adapters), parameters, base.detach())

    def current(self, layer, adapters: Sequence[str]) -> Tensor | None:
        """The weight, if it is current."""
        kept = self._kept
        if kept is None or kept.origin != self._origin(layer, adapters):
            return None
        pairs = zip(kept.parameters, self._list(layer, adapters))
        return kept.weight if all(is_same(before, now) for before, now in pairs) else None

    def forget(self) -> None:
        self._kept = None

    @staticmethod
    def _origin(layer, adapters: Sequence[str]) -> tuple:
        base = layer.get_base_layer().weight
        strengths = tuple((name, layer.strength(name)) for name in adapters)
        parameters = RotatedWeight._list(layer, adapters)
        identities = tuple((p.data_ptr(), version(p)) for p in parameters if not is_on_host(p))
        return strengths, base.data_ptr(), version(base), base.dtype, base.device, identities

    @staticmethod
    def _list(layer, adapters: Sequence[str]) -> list[Tensor]:
        return [parameter for name in adapters for parameter in layer.parameters_of(name)]


def is_same(before: Tensor, now: Tensor) -> bool:
    """Whether a parameter is what it was. Elsewhere than on a CPU, its origin has already said so."""
    if (before.device, before.dtype) != (now.device, now.dtype):
        return False
    return not is_on_host(now) or torch.equal(before, now)


def is_compatible(before: dict[str, tuple], now: dict[str, tuple]) -> bool:
    """Whether no adapter that is in both has another version now."""
    return before == now or all(now.get(name, versions) == versions for name, versions in before.items())


def version(tensor: Tensor) -> int | None:
    """How often a tensor has been written on in place; None for those of `torch.inference_mode`."""
    return None if tensor.is_inference() else tensor._version
