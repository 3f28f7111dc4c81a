"""Renders are deterministic, their truth is true, and captions say nothing that is not so."""

import hashlib
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from toyworld import CATEGORIES, COLOURS, CONTEXTS, PATTERNS, caption, render, sample_scene
from toyworld.captions import RARE_WORDS

SCENES = [sample_scene(seed, category=category) for seed, category in enumerate(CATEGORIES * 3)]


def widened(mask: Image.Image, size: int) -> np.ndarray:
    return np.asarray(mask.filter(ImageFilter.MaxFilter(size))) > 0


def test_the_world_is_as_large_as_promised():
    assert len(CATEGORIES) >= 12 and len(COLOURS) == 10 and len(PATTERNS) == 4 and len(CONTEXTS) == 10


def test_a_seed_gives_the_same_bytes_in_another_process():
    program = (
        "import hashlib; from toyworld import render, sample_scene\n"
        "print(hashlib.sha256(b''.join(render(sample_scene(s)).image.tobytes() for s in range(8))).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = hashlib.sha256(b"".join(render(sample_scene(s)).image.tobytes() for s in range(8))).hexdigest()
    assert run.stdout.strip() == here


def test_different_seeds_give_different_pictures():
    assert len({render(sample_scene(seed)).image.tobytes() for seed in range(50)}) == 50


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.individual.category)
def test_the_mask_covers_the_object(scene):
    """Recolouring the object changes pixels under its mask and nowhere else."""
    body = (
        (10, 200, 190)
        if sum(abs(a - b) for a, b in zip(scene.individual.body, (10, 200, 190))) > 150
        else (250, 40, 90)
    )
    recoloured = replace(scene, individual=replace(scene.individual, body=body))
    before, after = render(scene), render(recoloured)
    changed = (np.asarray(before.image).astype(int) - np.asarray(after.image) != 0).any(-1)
    mask = np.asarray(before.mask) > 0
    assert before.mask.tobytes() == after.mask.tobytes()
    assert not (changed & ~mask).any()
    assert changed.sum() > 0.2 * mask.sum()  # most objects are mostly body
    assert 0.03 < mask.mean() < 0.6


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.individual.category)
def test_edges_lie_on_the_object_and_trace_its_border(scene):
    picture = render(scene)
    edges, mask = np.asarray(picture.edges) > 64, np.asarray(picture.mask) > 127
    inner = np.asarray(Image.fromarray(mask).filter(ImageFilter.MinFilter(3))) if mask.any() else mask
    border = mask & ~inner
    assert not (edges & ~widened(picture.mask, 3)).any()
    assert (widened(picture.edges.point(lambda v: 255 * (v > 64)), 5) & border).sum() >= 0.98 * border.sum()


def test_captions_are_true_and_leave_things_out():
    rng, stated = random.Random(0), []
    for seed in range(2000):
        scene = sample_scene(seed)
        result = caption(scene, rng)
        truth = scene.attributes()
        assert all(said in (-1, true) for said, true in zip(result.stated, truth))
        assert result.stated[0] == truth[0]
        named = [list(COLOURS)[result.stated[1]]] if result.stated[1] >= 0 else []
        named += [CONTEXTS[result.stated[3]]] if result.stated[3] >= 0 else []
        assert all(word in result.text for word in named)
        others = set(COLOURS) - set(named)
        words = result.text.replace("on top of a purple rug", "").replace("on top of green grass", "").split()
        assert not others & set(words)
        assert not set(RARE_WORDS) & set(words)
        stated.append(result.stated)
    shares = (np.array(stated) >= 0).mean(0)
    assert shares[0] == 1 and shares[1:].min() > 0.3 and shares[1:].max() < 0.95


def test_attributes_are_kept_and_the_rest_is_free():
    scenes = [sample_scene(s, category="mug", colour="red", pattern="plain", context="in the snow") for s in range(60)]
    assert {scene.attributes() for scene in scenes} == {(1, 0, 0, CONTEXTS.index("in the snow"))}
    traits = [(s.individual.tone is not None, s.individual.emblem is not None) for s in scenes]
    assert len(set(traits)) == 4  # with and without a second colour, with and without an emblem
