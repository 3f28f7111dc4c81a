"""Random numbers that depend on the seed and on what they are for, never on how often a generator was called.

Therefore a resumed run needs no state of a generator, and neither batch size, nor accumulation, nor the number of
processes changes the random numbers of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from finetuning.readings import to_device

CPU = torch.device("cpu")


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on all parts, e.g. (seed, "noise", position), and on nothing else.

    It is the same in every process and on every machine.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A new generator, seeded by `derived_seed`. It is on the CPU, so that all devices get the same numbers."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def normal(
    shape: Sequence[int], seed: int, purpose: str, keys: Sequence[object], like: torch.Tensor | None = None
) -> torch.Tensor:
    """Standard normal numbers (len(keys), *shape). Row i depends on (seed, purpose, keys[i]) alone.

    Args:
        like: a tensor whose device and dtype the result has; the host does not wait for a GPU. None = float32 on the
            CPU.
    """
    drawn = torch.stack([torch.randn(*shape, generator=generator(seed, purpose, key)) for key in keys])
    return drawn if like is None else to_device(drawn, like.device, like.dtype)


def integers(high: int, seed: int, purpose: str, keys: Sequence[object], device: torch.device = CPU) -> torch.Tensor:
    """Uniform integers in [0, high), int64, (len(keys),). Entry i depends on (seed, purpose, keys[i]) alone.

    Args:
        device: of the result; the host does not wait for a GPU.
    """
    drawn = torch.tensor([derived_seed(seed, purpose, key) % high for key in keys], dtype=torch.long)
    return to_device(drawn, device)


@lru_cache(maxsize=16)
def permutation(n: int, seed: int, purpose: str, epoch: int) -> tuple[int, ...]:
    """A random order of range(n) for an epoch."""
    return tuple(torch.randperm(n, generator=generator(seed, purpose, epoch)).tolist())


def seed_modules(*parts: object) -> None:
    """Seed torch's global generator, from which dropout inside the model draws."""
    torch.manual_seed(derived_seed(*parts))
