"""How a base model's noise process runs: which times are trained, how images are noised, and what is asked back.

A process is what the trainers know of a model's mathematics. Everything here is tensors in, tensors out; the formulas
themselves are the pure functions in diffusion.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from finetuning.objective.diffusion import add_noise, min_snr_weight, offset_noise, target
from finetuning.randomness import integers, normal


class Process(Protocol):
    """A noise process between images, x_0, and noise; B samples at a time."""

    def times(self, seed: int, keys: Sequence[str], size: tuple[int, int] | None = None) -> torch.Tensor:
        """The times at which B samples are trained, (B,); entry i depends on (seed, keys[i]) alone.

        size: (h, w) of the latents; some models train larger images at noisier times. None: of the model's own size.
        """

    def spread_times(self, count: int) -> torch.Tensor:
        """Times spread evenly over the process, (count,), for losses that are to be compared with each other."""

    def noise(self, x0: torch.Tensor, seed: int, keys: Sequence[str]) -> torch.Tensor:
        """The noise of B samples, in the shape of x0, (B, C, h, w). Row i depends on (seed, keys[i]) alone."""

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t: the latents x0 with the noise of time t in them. x0, noise: (B, C, h, w); t: (B,)."""

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model should predict from x_t, (B, C, h, w)."""

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """How much the error of a sample at time t counts, (B,)."""

    def to(self, device: torch.device) -> Process:
        """The same process, with its tensors on this device."""


@dataclass(frozen=True)
class Diffusion:
    """The process of DDPM (arXiv 2006.11239): x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε, at whole times t in [0, T).

    Attributes:
        alpha_bar: ᾱ, the cumulative product of the noise schedule, (T,), float32.
        prediction: what the model predicts: "epsilon", the noise, or "v_prediction", v (arXiv 2202.00512).
        snr_gamma: γ of Min-SNR weights (arXiv 2303.09556). None weighs all times alike.
        noise_offset: strength of a shift of the noise that all pixels of a channel share. 0 means none.
    """

    alpha_bar: torch.Tensor
    prediction: str
    snr_gamma: float | None = None
    noise_offset: float = 0.0

    def times(self, seed: int, keys: Sequence[str], size: tuple[int, int] | None = None) -> torch.Tensor:
        return integers(len(self.alpha_bar), seed, "timestep", keys, self.alpha_bar.device)

    def spread_times(self, count: int) -> torch.Tensor:
        T = len(self.alpha_bar)
        return torch.arange(count, device=self.alpha_bar.device) * T // count + T // (2 * count)

    def noise(self, x0: torch.Tensor, seed: int, keys: Sequence[str]) -> torch.Tensor:
        noise = normal(x0.shape[1:], seed, "noise", keys, like=x0)
        if not self.noise_offset:
            return noise
        shift = normal(x0.shape[1:2], seed, "offset", keys, like=x0)  # (B, C)
        return offset_noise(noise, shift, self.noise_offset)

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return add_noise(x0, noise, self.alpha_bar[t])

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return target(x0, noise, self.alpha_bar[t], self.prediction)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        if self.snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        return min_snr_weight(self.alpha_bar[t], self.snr_gamma, self.prediction)

    def to(self, device: torch.device) -> Diffusion:
        return replace(self, alpha_bar=self.alpha_bar.to(device))
