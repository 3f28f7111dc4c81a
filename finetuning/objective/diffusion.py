"""The denoising objective of diffusion models, as pure functions of tensors.

ᾱ_t is the noise schedule's cumulative product; x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (DDPM, arXiv 2006.11239, Eq. 4).
"""

from __future__ import annotations

import torch


def add_noise(x0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Latents with noise in them, x_t, (B, …) (DDPM, Eq. 4). x0, noise: (B, …); alpha_bar: ᾱ of each sample, (B,)."""
    alpha_bar = _rows(alpha_bar, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def target(x0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """What the model should predict, (B, …): ε, or v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0 (arXiv 2202.00512, appendix D).

    Args:
        x0, noise: (B, …).
        alpha_bar: ᾱ of each sample, (B,).
        prediction_type: "epsilon" or "v_prediction", as diffusers names them.

    Raises:
        ValueError: if prediction_type is another one.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type != "v_prediction":
        raise ValueError(f"prediction_type={prediction_type!r}: must be epsilon or v_prediction")
    alpha_bar = _rows(alpha_bar, x0)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


def mean_squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each sample, (B,), in float32. prediction, target: (B, …)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def min_snr_weight(alpha_bar: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """The weight of each sample's error, (B,), by which an error in x_0 counts min(SNR, γ) (arXiv 2303.09556, Eq. 8).

    SNR = ᾱ / (1 - ᾱ). The squared error of ε is that of x_0 times SNR, and the one of v is that of x_0 times SNR + 1;
    the weights are divided by these factors.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # SNR = 0 gives 1, the limit


def offset_noise(noise: torch.Tensor, shift: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise plus a shift that all pixels of a channel share, from which a model learns overall brightness.

    Args:
        noise: (B, C, h, w).
        shift: normal random numbers, (B, C).
        strength: the standard deviation of the shift.
    """
    return noise + strength * shift[..., None, None]


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) as (B, 1, …, 1), with as many dimensions as `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
