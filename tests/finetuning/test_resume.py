"""N steps = k steps + resume + (N - k) steps, bit for bit, weights and optimizer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from training import assert_same, flags, metrics, optimizer_of, prior_flags, run, run_in_two, weights

from finetuning.training.checkpoint import load_state
from finetuning.training.state import tensors_in

PRIOR = "--with_prior_preservation"
ACCUMULATION = ("--gradient_accumulation_steps=2", "--train_batch_size=1")
VARIANTS = {
    "boft": [PRIOR],
    "no prior": [],
    "bf16": [PRIOR, "--mixed_precision=bf16"],
    "accumulation": [PRIOR, *ACCUMULATION],
    "text encoder": [PRIOR, "--train_text_encoder"],
    "bf16, accumulation, text encoder, no prior, averages": [
        "--mixed_precision=bf16", *ACCUMULATION, "--train_text_encoder", "--use_ema",
    ],
    "dropout, crops, flips": [PRIOR, "--boft_dropout=0.5", "--random_flip", "--no_cache_latents"],
    "two processes, bf16, accumulation, text encoder, no prior": [
        run_in_two, "--mixed_precision=bf16", *ACCUMULATION, "--train_text_encoder", "--boft_dropout=0.2",
    ],
    "a schedule": [PRIOR, "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--boft_scale_learning_rate=1e-3"],
}  # fmt: skip


def test_8_bit_adam_resumes_to_the_same_bits(toy_base, photos, tmp_path):
    """In a full fine-tune: smaller tensors keep 32-bit state."""
    pytest.importorskip("bitsandbytes")
    arguments = flags(toy_base, photos, tmp_path / "output", "--use_8bit_adam", "--checkpointing_steps=2", adapter=())
    assert run(*arguments) == 0
    checkpoint = tmp_path / "output" / "checkpoint-4"
    alone, state = weights(tmp_path / "output"), list(tensors_in(load_state(checkpoint)))
    assert any(tensor.dtype == torch.uint8 for tensor in state)
    assert run(*arguments, "--resume_from_checkpoint=checkpoint-2") == 0
    assert_same(alone, weights(tmp_path / "output"))
    assert all(torch.equal(a, b) for a, b in zip(state, tensors_in(load_state(checkpoint)), strict=True))


@pytest.mark.parametrize("more", VARIANTS.values(), ids=VARIANTS)
def test_resumed_run_equals_the_run_left_alone(more, toy_base, photos, tmp_path):
    prior = prior_flags(tmp_path / "class") if PRIOR in more else []
    train = run_in_two if run_in_two in more else run
    arguments = [*prior, *(flag for flag in more if flag is not run_in_two), "--checkpointing_steps=2"]
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    assert train(*flags(toy_base, photos, alone, *arguments)) == 0
    processes = json.loads((alone / "environment.json").read_text())["processes"]
    assert processes == ("2" if train is run_in_two else "1")
    resumed.mkdir()
    shutil.copytree(alone / "checkpoint-2", resumed / "checkpoint-2")
    assert train(*flags(toy_base, photos, resumed, *arguments, "--resume_from_checkpoint=latest")) == 0
    assert_same(weights(alone), weights(resumed))
    assert_same(optimizer_of(alone / "checkpoint-4"), optimizer_of(resumed / "checkpoint-4"))
    schedules = [load_state(folder / "checkpoint-4")["schedule"] for folder in (alone, resumed)]
    assert schedules[0] == schedules[1]
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (alone, resumed)]
    assert losses[0][2:] == losses[1]
