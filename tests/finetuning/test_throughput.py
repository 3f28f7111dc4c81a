"""Training loops that are timed: they train what they say, and each step is timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuning.adapter import add_boft, add_lora
from finetuning.stable_diffusion import load_stable_diffusion
from finetuning.throughput import Workload, plain_loop, run_trainer, write_images

TRAINER = Path(__file__).parents[2] / "train_dreambooth.py"


@pytest.fixture
def work(toy_base, tmp_path) -> Workload:
    images = write_images(tmp_path / "images", 16, photos=1, class_images=1)
    return Workload(str(toy_base), str(images), 16, 1, "attention", "no", steps=3, warmup=1, threads=1)


def test_plain_loops_train_stock_adapters_of_the_trainers_size(work, toy_base):
    unet = load_stable_diffusion(str(toy_base)).unet
    for kind, ours in (
        ("boft", add_boft(unet, ["attention"], block_size=8)),
        ("lora", add_lora(load_stable_diffusion(str(toy_base)).unet, ["attention"], rank=16)),
    ):
        found = plain_loop(kind, work)
        assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
        assert found["trained"] == ours.count(), kind


def test_a_run_of_the_trainer_is_timed_step_by_step(work, tmp_path):
    found = run_trainer({"use_boft": True, "boft_block_size": 8}, work, TRAINER, tmp_path)
    assert len(found["seconds"]) == 3 and 0 < min(found["seconds"]) < 60 and 0.1 < found["peak"] < 20
    assert found["trained"] == plain_loop("boft", work)["trained"]
