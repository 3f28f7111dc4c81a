"""Exponential moving averages of what is trained, which are less noisy than its last step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel


class Averages:
    """Parameters, and their exponential moving averages by diffusers' EMAModel.

    Args:
        parameters: those that are trained.
        decay: of the averages, 0 to 1; in step t it is at most (1 + t) / (10 + t), so that early steps fade.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.model = EMAModel(self.parameters, decay=decay)

    def step(self) -> None:
        """Bring the averages up to date; to be called after each optimizer step."""
        self.model.step(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of steps, as EMAModel keeps them."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.model.load_state_dict(state)
        self.model.to(self.parameters[0].device)


@contextmanager
def applied(averages: Averages | None) -> Iterator[None]:
    """Put the averages in the place of the parameters for as long as the block lasts. None changes nothing."""
    if averages is None:
        yield
        return
    averages.model.store(averages.parameters)
    averages.model.copy_to(averages.parameters)
    try:
        yield
    finally:
        averages.model.restore(averages.parameters)
