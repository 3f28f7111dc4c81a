"""Exponential moving averages of what is trained, which are less noisy than its last step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel


class Averages:
    """diffusers' EMAModel and the parameters that it averages."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.model = EMAModel(self.parameters, decay=decay)

    def step(self) -> None:
        """After each optimizer step."""
        self.model.step(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
        self.model.to(self.parameters[0].device)


@contextmanager
def applied(averages: Averages | None):
    """The averages in the place of the parameters, for as long as the block lasts; None changes nothing."""
    if averages is None:
        yield
        return
    averages.model.store(averages.parameters)
    averages.model.copy_to(averages.parameters)
    try:
        yield
    finally:
        averages.model.restore(averages.parameters)
