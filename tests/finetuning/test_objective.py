"""Identities of the objective."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from finetuning.objective.diffusion import add_noise, mean_squared_error, min_snr_weight, offset_noise, target

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
T = torch.tensor([0, 10, 500, 999])


def draw(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_noise_and_velocity_are_those_of_the_library():
    x0, noise, alpha_bar = draw(0), draw(1), SCHEDULE.alphas_cumprod[T]
    torch.testing.assert_close(add_noise(x0, noise, alpha_bar), SCHEDULE.add_noise(x0, noise, T))
    torch.testing.assert_close(target(x0, noise, alpha_bar, "v_prediction"), SCHEDULE.get_velocity(x0, noise, T))
    assert target(x0, noise, alpha_bar, "epsilon") is noise


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="sample"):
        target(draw(0), draw(1), SCHEDULE.alphas_cumprod[T], "sample")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_x0_by_the_clipped_snr(kind):
    """Whatever is predicted, weight × its squared error = min(SNR, γ) × the squared error of x_0."""
    x0, noise, alpha_bar = draw(0).double(), draw(1).double(), SCHEDULE.alphas_cumprod[T].double()
    x_t, wrong_x0 = add_noise(x0, noise, alpha_bar), x0 + 0.1 * draw(2).double()
    a = alpha_bar.view(-1, 1, 1, 1)
    wrong_noise = (x_t - a.sqrt() * wrong_x0) / (1 - a).sqrt()
    prediction = target(wrong_x0, wrong_noise, alpha_bar, kind)
    weight = min_snr_weight(alpha_bar, 5.0, kind)
    error = (prediction - target(x0, noise, alpha_bar, kind)).square().flatten(1).mean(1)
    expected = (alpha_bar / (1 - alpha_bar)).clamp(max=5.0) * (wrong_x0 - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(weight * error, expected)


def test_min_snr_is_the_one_of_diffusers_scripts():
    snr = compute_snr(SCHEDULE, T)
    alpha_bar = SCHEDULE.alphas_cumprod[T]
    torch.testing.assert_close(min_snr_weight(alpha_bar, 5.0, "epsilon"), snr.clamp(max=5) / snr)
    torch.testing.assert_close(min_snr_weight(alpha_bar, 5.0, "v_prediction"), snr.clamp(max=5) / (snr + 1))


def test_min_snr_at_zero_terminal_snr_is_finite():
    zero = torch.zeros(1)
    assert min_snr_weight(zero, 5.0, "epsilon") == 1
    assert min_snr_weight(zero, 5.0, "v_prediction") == 0


def test_offset_noise_shifts_whole_channels():
    noise, shift = draw(0), torch.randn(4, 3)
    difference = offset_noise(noise, shift, 0.1) - noise
    torch.testing.assert_close(difference, (0.1 * shift)[..., None, None].expand_as(noise))


def test_errors_are_float32_and_one_a_sample():
    errors = mean_squared_error(draw(0).bfloat16(), torch.zeros(4, 3, 5, 5))
    assert errors.shape == (4,) and errors.dtype == torch.float32
