"""N steps = k steps + resume + (N - k) steps, bit for bit, weights and optimizer."""

from __future__ import annotations

import shutil

import pytest
from training import assert_same, flags, metrics, optimizer_of, prior_flags, run, weights

VARIANTS = {
    "boft": [],
    "bf16": ["--mixed_precision=bf16"],
    "accumulation": ["--gradient_accumulation_steps=2", "--train_batch_size=1"],
    "text encoder": ["--train_text_encoder"],
    "dropout, crops, flips": ["--boft_dropout=0.5", "--random_flip", "--no_cache_latents"],
    "a schedule": ["--lr_scheduler=cosine", "--lr_warmup_steps=2", "--boft_scale_learning_rate=1e-3"],
}


@pytest.mark.parametrize("more", VARIANTS.values(), ids=VARIANTS)
def test_resumed_run_equals_the_run_left_alone(more, toy_base, photos, tmp_path):
    arguments = [*prior_flags(tmp_path / "class"), "--checkpointing_steps=2", *more]
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    assert run(*flags(toy_base, photos, alone, *arguments)) == 0
    resumed.mkdir()
    shutil.copytree(alone / "checkpoint-2", resumed / "checkpoint-2")
    assert run(*flags(toy_base, photos, resumed, *arguments, "--resume_from_checkpoint=latest")) == 0
    assert_same(weights(alone), weights(resumed))
    assert_same(optimizer_of(alone / "checkpoint-4"), optimizer_of(resumed / "checkpoint-4"))
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (alone, resumed)]
    assert losses[0][2:] == losses[1]
