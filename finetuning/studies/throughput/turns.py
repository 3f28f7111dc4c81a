"""Timed steps of several models in one process, in turn, and what their times say."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping


def in_turn(
    steps: Mapping[str, Callable[[], float]],
    rounds: int,
    tell: bool = False,
    is_enough: Callable[[dict[str, list[float]]], bool] | None = None,
) -> dict[str, list[float]]:
    """Times of each of the steps, `rounds` each. A step does its work and returns how long it took, in any unit.

    Before each step that counts comes one of the same kind that does not, as in training, where a step finds caches
    and memory as one like it has left them. Every round has an order of its own, drawn at random.

    Args:
        tell: Say on standard error how many rounds are done.
        is_enough: Is asked after each round, with all times so far, whether it shall be the last one.
    """
    names, times = list(steps), {name: [] for name in steps}
    shuffle = random.Random(0).shuffle
    for round_ in range(1, rounds + 1):
        shuffle(names)
        for name in names:
            steps[name]()
            times[name].append(steps[name]())
        if tell:
            print(f"  round {round_} of {rounds}", file=sys.stderr)
        if is_enough is not None and is_enough(times):
            break
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """Median over the rounds of the ratio to the reference within the round."""
    return statistics.median(own / other for own, other in zip(times, reference))


def spread(times: list[float], reference: list[float]) -> float:
    """Half the distance between the quartiles of that ratio; 0 for a single round."""
    if len(times) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles([own / other for own, other in zip(times, reference)], n=4)
    return (upper - lower) / 2
