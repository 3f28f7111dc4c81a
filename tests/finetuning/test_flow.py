"""Flow matching: identities of its times, its path, and its weights."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from finetuning.objective.flow import Flow, constant_shift, exponential_shift, shifted
from finetuning.randomness import normal

KEYS = [str(i) for i in range(4000)]


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "shifted"])
def test_times_follow_from_seed_and_key_alone(sampling):
    flow = Flow(tokens=256, shift=constant_shift(3.0), sampling=sampling)
    times = flow.times(5, KEYS)
    assert torch.equal(times[7:9], flow.times(5, KEYS[7:9]))
    assert not torch.equal(times, flow.times(6, KEYS))
    assert times.dtype == torch.float32 and times.min() > 0 and times.max() < 1


def test_uniform_times_have_the_quantiles_of_a_uniform_number():
    times = Flow(tokens=1, sampling="uniform").times(0, KEYS).sort().values
    ranks = (torch.arange(len(KEYS)) + 0.5) / len(KEYS)
    assert (times - ranks).abs().max() < 1.63 / math.sqrt(len(KEYS))  # Kolmogorov and Smirnov's limit at 1 %


def test_logit_normal_times_have_normal_logits():
    logits = Flow(tokens=1, sampling="logit-normal", mean=0.5, std=2.0).times(0, KEYS).logit().sort().values
    ranks = torch.special.ndtr((logits - 0.5) / 2.0)
    assert (ranks - (torch.arange(len(KEYS)) + 0.5) / len(KEYS)).abs().max() < 1.63 / math.sqrt(len(KEYS))


def test_shifted_times_are_uniform_ones_as_the_sampler_shifts_its_own():
    uniform = Flow(tokens=1, sampling="uniform").times(0, KEYS)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow = Flow(tokens=256, shift=exponential_shift(lambda tokens: tokens / 512), patch=2)
    for size, tokens in ((None, 256), ((32, 32), 256), ((64, 80), 1280)):
        wanted = scheduler.time_shift(tokens / 512, 1.0, uniform)
        torch.testing.assert_close(flow.times(0, KEYS, size), wanted, atol=1e-6, rtol=1e-5)
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(shifted(plain.sigmas, 3.0), static.sigmas)


def test_extreme_times_stay_inside():
    for flow in (Flow(1, sampling="logit-normal", mean=50.0), Flow(1, constant_shift(1e12))):
        assert flow.times(0, KEYS[:9]).min() > 0.99 and flow.times(0, KEYS[:9]).max() < 1


def test_the_target_is_the_derivative_of_the_path():
    flow = Flow(tokens=1)
    x0, noise = (normal((2, 3, 4), 0, name, range(3)).double() for name in ("x", "n"))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).requires_grad_()
    slope = torch.autograd.functional.jvp(lambda t: flow.noised(x0, noise, t), t, torch.ones_like(t))[1]
    torch.testing.assert_close(slope, flow.target(x0, noise, t))
    assert torch.equal(flow.noised(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(flow.noised(x0, noise, torch.ones(3)), noise)


def test_noise_and_spread_times():
    flow = Flow(tokens=1)
    x0 = torch.zeros(3, 2, 4, 5)
    noise = flow.noise(x0, 1, ["a", "b", "c"])
    assert torch.equal(noise[1:2], flow.noise(x0[:1], 1, ["b"]))
    assert torch.equal(flow.spread_times(4), torch.tensor([0.125, 0.375, 0.625, 0.875]))


def test_weights():
    t = torch.tensor([0.25, 0.5])
    assert torch.equal(Flow(1).weight(t), torch.ones(2))
    assert torch.equal(Flow(1, weighting="sigma-sqrt").weight(t), torch.tensor([16.0, 4.0]))
    torch.testing.assert_close(Flow(1, weighting="cosmap").weight(t), torch.tensor([3.2, 4.0]) / math.pi)


def test_wrong_settings_are_refused():
    for settings, name in (
        ({"sampling": "normal"}, "logit-normal"),
        ({"weighting": "x"}, "cosmap"),
        ({"std": 0}, "std=0"),
    ):
        with pytest.raises(ValueError, match=name):
            Flow(1, **settings)
