"""Every random number follows from the seed and from what it is for, never from how often a generator was called.

So a resumed run needs no generator state, and neither the batch size, nor accumulation, nor the number of processes
changes what a sample sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from finetuning.readings import onto

CPU = torch.device("cpu")


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2**63) from, say, (seed, "noise", position); the same in every process and on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A generator of its own on the CPU, whatever device trains, so that devices see the same numbers."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def normal(
    shape: Sequence[int], seed: int, purpose: str, keys: Sequence[object], like: torch.Tensor | None = None
) -> torch.Tensor:
    """Standard normal numbers (len(keys), *shape): row i depends on (seed, purpose, keys[i]) alone.

    Args:
        like: Its device and dtype are the result's; a GPU is not waited for. None = float32 on the CPU.
    """
    drawn = torch.stack([torch.randn(*shape, generator=generator(seed, purpose, key)) for key in keys])
    return drawn if like is None else onto(drawn, like.device, like.dtype)


def integers(high: int, seed: int, purpose: str, keys: Sequence[object], device: torch.device = CPU) -> torch.Tensor:
    """Uniform integers in [0, high), shape (len(keys),): entry i depends on (seed, purpose, keys[i]) alone.

    Args:
        device: Where they are wanted; a GPU is not waited for.
    """
    drawn = torch.tensor([derived_seed(seed, purpose, key) % high for key in keys], dtype=torch.long)
    return onto(drawn, device)


@lru_cache(maxsize=16)
def permutation(n: int, seed: int, purpose: str, epoch: int) -> tuple[int, ...]:
    """An order of range(n) for this epoch."""
    return tuple(torch.randperm(n, generator=generator(seed, purpose, epoch)).tolist())


def seed_modules(*parts: object) -> None:
    """Seed torch's global generator, from which dropout inside the model draws."""
    torch.manual_seed(derived_seed(*parts))
