"""Times of several kinds of steps, measured in turns in one process, and their ratios."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping


def interleaved_times(
    steps: Mapping[str, Callable[[], float]],
    rounds: int,
    tell: bool = False,
    is_enough: Callable[[dict[str, list[float]]], bool] | None = None,
) -> dict[str, list[float]]:
    """Time several kinds of steps in turns.

    Before each step that counts, one of the same kind is done that does not, because in training a step finds caches
    and memory as a step like it has left them. Every round has an order of its own, drawn at random.

    Args:
        steps: {name: a function that does a step and returns how long it took, in any unit}.
        rounds: how many times of each kind are measured.
        tell: whether the number of finished rounds is written to the error stream.
        is_enough: is called after each round with all times so far; if it returns True, that round was the last one.

    Returns:
        {name: times}, one time for each round.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
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
    """The median, over all rounds, of the ratio to the reference's time in the same round."""
    return statistics.median(own / other for own, other in zip(times, reference))


def spread(times: list[float], reference: list[float]) -> float:
    """Half the distance between the quartiles of these ratios; 0 for a single round."""
    if len(times) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles([own / other for own, other in zip(times, reference)], n=4)
    return (upper - lower) / 2
