"""Sets of renders on disk, made once by all cores: images as one memory-mapped array, scenes again from their seeds.

Four sets with seeds of their own, so that what trains the base, what judges it and what is held out never meet.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .render import SIZE, render
from .scene import Individual, Scene, sample_individual, sample_scene

VIEWS = 8  # pictures of each individual in the set "individuals"
SIZES = {"train": 60_000, "heldout": 2_048, "judge": 24_000, "individuals": 20_000, "heldout_individuals": 2_400}
_FIRST_SEED = {name: (k + 1) * 1_000_000_000 for k, name in enumerate(SIZES)}
_CHUNK = 500


@lru_cache(maxsize=4096)
def individual(name: str, index: int) -> Individual:
    """The `index`-th individual of a set of individuals."""
    return sample_individual(random.Random(_FIRST_SEED[name] + index))


def scene(name: str, index: int) -> Scene:
    """The scene behind the `index`-th picture of a set."""
    seed = _FIRST_SEED[name] + 10_000_000 + index
    if "individuals" in name:
        return sample_scene(seed, individual=individual(name, index // VIEWS))
    return sample_scene(seed)


def _fill(path: Path, name: str, start: int, stop: int) -> int:
    images = np.load(path, mmap_mode="r+")
    for index in range(start, stop):
        images[index] = np.asarray(render(scene(name, index)).image)
    return stop - start


def images(folder: Path, name: str, workers: int = 2) -> np.ndarray:
    """The pictures of a set, uint8 (N, 64, 64, 3), read-only and memory-mapped; rendered into `folder` if missing."""
    path, partial, size = folder / f"{name}.npy", folder / f"{name}.partial.npy", SIZES[name]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(partial, "w+", np.uint8, (size, SIZE, SIZE, 3)).flush()
        starts = range(0, size, _CHUNK)
        with ProcessPoolExecutor(workers) as pool, tqdm(total=size, desc=f"rendering {name}", unit="img") as bar:
            for done in pool.map(
                _fill,
                [partial] * len(starts),
                [name] * len(starts),
                starts,
                [min(s + _CHUNK, size) for s in starts],
            ):
                bar.update(done)
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def attributes(name: str, count: int | None = None) -> np.ndarray:
    """Indices of (category, colour, pattern, context) of a set's pictures, int64 (N, 4); -1 for a nameless hue."""
    return np.array([scene(name, index).attributes() for index in range(count or SIZES[name])])
