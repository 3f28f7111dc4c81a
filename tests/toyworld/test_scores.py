"""Distances between distributions, on cases with known answers."""

import numpy as np
import pytest
import torch

from toyworld.scores import energy_distance, total_variation


def test_total_variation_is_the_mass_that_moves():
    a = np.array([0, 0, 1, 1])
    assert total_variation(a, a[::-1], 3) == 0
    assert total_variation(a, np.array([2, 2]), 3) == 1
    assert total_variation(a, np.array([0, 1, 2, 2]), 3) == pytest.approx(0.5)


def test_energy_distance():
    a = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert energy_distance(a, a) == pytest.approx(0)
    assert energy_distance(a[:1], a[1:]) == pytest.approx(1)
    b = torch.tensor([[1.0, 0.0]])  # E|A-B| = 1, E|A-A'| = 1, E|B-B'| = 0
    assert energy_distance(a, b) == energy_distance(b, a) == pytest.approx(0.5)
    assert energy_distance(a, 10 + b) > energy_distance(a, 3 + b), "grows with the distance"
    assert energy_distance(b, b) == 0, "one point twice"
