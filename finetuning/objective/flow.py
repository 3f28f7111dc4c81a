"""Flow matching (arXiv 2210.02747) on straight paths (rectified flow, arXiv 2209.03003), as a noise process.

x_σ = (1 - σ) x_0 + σ n, and the model is asked for the velocity n - x_0. The time of a sample is σ itself, in (0, 1):
σ = 0 is the image and σ = 1 is noise. Families turn σ into what their denoiser calls time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from finetuning.randomness import integers, normal

Shift = Callable[[int], float]  # from the number of tokens of an image to the factor s of `shifted`
SAMPLINGS = ("uniform", "logit-normal", "shifted")
WEIGHTINGS = ("none", "sigma-sqrt", "cosmap")
RESOLUTION = 2**24  # of uniform numbers: as many as float32 tells apart in (0, 1)


def _unshifted(tokens: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Flow:
    """The process of flow matching.

    Attributes:
        tokens: of an image of the model's own resolution; where `times` is not told sizes, these are meant.
        shift: the model's own shift of times towards noise, as its sampler has it, by the number of tokens.
        patch: side of the square of latents that makes a token.
        sampling: of the times that are trained, "uniform"; "logit-normal", σ = sigmoid(mean + std z) with standard
            normal z (Stable Diffusion 3, arXiv 2403.03206, Equation 19); or "shifted", uniform numbers, shifted as the
            model's sampler shifts its own.
        mean, std: of logit-normal times.
        weighting: of a sample's error: "none", 1; "sigma-sqrt", 1 / σ²; "cosmap", 2 / (π (1 - 2σ + 2σ²)), both of
            arXiv 2403.03206, Section 3.1, relative to uniform times.
        device: where times lie.

    Raises:
        ValueError: an unknown sampling or weighting, or a std that is not positive.
    """

    tokens: int
    shift: Shift = _unshifted
    patch: int = 1
    sampling: str = "shifted"
    mean: float = 0.0
    std: float = 1.0
    weighting: str = "none"
    device: torch.device | str = "cpu"

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling={self.sampling!r}: must be one of {', '.join(SAMPLINGS)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r}: must be one of {', '.join(WEIGHTINGS)}")
        if not self.std > 0:
            raise ValueError(f"std={self.std}: must be above 0")

    def times(self, seed: int, keys: Sequence[str], size: tuple[int, int] | None = None) -> torch.Tensor:
        """σ of B samples, (B,), in (0, 1), float32; entry i depends on (seed, keys[i]) alone.

        size: (h, w) of the latents, where images are not of the model's own resolution. Only "shifted" times depend
            on it.
        """
        u = ((integers(RESOLUTION, seed, "timestep", keys) + 0.5) / RESOLUTION).double()  # uniform in (0, 1)
        if self.sampling == "logit-normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        elif self.sampling == "shifted":
            tokens = self.tokens if size is None else size[0] * size[1] // self.patch**2
            u = shifted(u, self.shift(tokens))
        smallest = 1 / RESOLUTION  # so that rounding to float32 makes no 0 and no 1
        return u.clamp(smallest, 1 - smallest).float().to(self.device)

    def spread_times(self, count: int) -> torch.Tensor:
        """`count` values of σ in the middle of as many equal parts of (0, 1), whatever times are trained, (count,)."""
        return (torch.arange(count, device=self.device) + 0.5) / count

    def noise(self, x0: torch.Tensor, seed: int, keys: Sequence[str]) -> torch.Tensor:
        """Standard normal noise in the shape of x0, (B, C, h, w); row i depends on (seed, keys[i]) alone."""
        return normal(x0.shape[1:], seed, "noise", keys, like=x0)

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_σ. x0, noise: (B, C, h, w); t: σ, (B,)."""
        sigma = t.reshape(-1, *[1] * (x0.ndim - 1)).to(x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity n - x_0, (B, C, h, w), which is the same at all times."""
        return noise - x0

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """How much the error of a sample at σ = t counts, (B,)."""
        if self.weighting == "sigma-sqrt":
            return t**-2
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        return torch.ones_like(t)

    def to(self, device: torch.device) -> Flow:
        """The same process with its times on a device."""
        return replace(self, device=device)


def shifted(sigma: torch.Tensor, s: float) -> torch.Tensor:
    """Times moved towards noise by a factor s > 0: s σ / (1 + (s - 1) σ) (arXiv 2403.03206, Equation 23)."""
    return s * sigma / (1 + (s - 1) * sigma)


def constant_shift(s: float) -> Shift:
    """The same factor for images of all sizes."""
    return lambda tokens: s


def exponential_shift(mu: Callable[[int], float]) -> Shift:
    """Factor e^μ, where μ follows from the number of tokens."""
    return lambda tokens: math.exp(mu(tokens))
