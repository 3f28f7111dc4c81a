"""Training loops that are timed: they train what they say, step by step in turn, and failures are told."""

from __future__ import annotations

import select
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluation import load_script

from finetuning.adapters.adapter import add_boft, add_lora
from finetuning.errors import RunError
from finetuning.models.loading import load_stable_diffusion
from finetuning.settings.reading import run_command
from finetuning.studies.throughput.inputs import write_images
from finetuning.studies.throughput.measure import TimedProcess, Workload, measure
from finetuning.studies.throughput.timing import interleaved_times, ratio, spread

TRAINER = Path(__file__).parents[2] / "train_dreambooth.py"


@pytest.fixture
def work(toy_base, tmp_path) -> Workload:
    images = write_images(tmp_path / "images", 16, photos=1, class_images=1)
    return Workload(str(toy_base), str(images), 16, 1, "attention", "no", steps=3, warmup=1, threads=1)


def test_the_trainer_and_plain_loops_take_turns_and_train_as_much(work, toy_base, tmp_path):
    boft = {"use_boft": True, "boft_block_size": 8}
    candidates = {"trainer, BOFT": boft, "plain BOFT": "boft", "plain LoRA": "lora"}
    found = measure(candidates, "plain LoRA", work, TRAINER, tmp_path, rounds=1)
    assert list(found) == list(candidates)
    unet = load_stable_diffusion(str(toy_base)).unet
    size = add_boft(unet, ["attention"], block_size=8).count()
    assert found["trainer, BOFT"]["trainable"] == found["plain BOFT"]["trainable"] == size
    unet = load_stable_diffusion(str(toy_base)).unet
    assert found["plain LoRA"]["trainable"] == add_lora(unet, ["attention"], rank=16).count()
    for row in found.values():
        assert 0 < row["seconds a step"] < 60 and 0.1 < row["peak GiB"] < 20
        assert row["steps a second"] == pytest.approx(1 / row["seconds a step"])
    assert found["plain LoRA"]["step / reference"] == 1 != found["plain BOFT"]["step / reference"]
    assert found["plain BOFT"]["step / reference"] == pytest.approx(
        found["plain BOFT"]["seconds a step"] / found["plain LoRA"]["seconds a step"]
    )


@pytest.mark.parametrize(
    ("flags", "words"), [(["--candidates", "nothing"], "names none beside"), (["--rounds=0"], "--rounds=0: must be 1")]
)
def test_a_benchmark_of_nothing_is_one_line(flags, words, capsys):
    assert run_command(load_script("benchmark").main, ["training", *flags]) == 2
    assert words in capsys.readouterr().err


def test_steps_in_turn_count_every_second_of_a_model_in_changing_order():
    begun = []

    def step(name):
        begun.append(name)
        return float(len(begun))

    times = interleaved_times({name: lambda name=name: step(name) for name in "abc"}, rounds=6)
    pairs = list(zip(begun[::2], begun[1::2]))
    assert all(first == second for first, second in pairs), "a step that counts follows one of its own"
    rounds = [tuple(first for first, _ in pairs[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 2
    counted = {name: [i + 1.0 for i in range(1, 36, 2) if begun[i] == name] for name in "abc"}
    assert times == counted


def test_ratio_and_spread_are_of_the_rounds():
    reference = [1.0, 2.0, 4.0, 8.0, 16.0]
    times = [factor * value for factor, value in zip((1.0, 1.1, 1.2, 1.3, 9.0), reference)]
    assert ratio(times, reference) == pytest.approx(1.2)
    assert spread(times, reference) == pytest.approx((5.15 - 1.05) / 2)  # quartiles of 1, 1.1, 1.2, 1.3, 9
    assert spread(reference, reference) == spread([1.0], [2.0]) == 0


def test_a_step_waits_for_its_turn(work, tmp_path):
    with TimedProcess("lora", work, TRAINER, tmp_path) as process:
        process.read("trained")
        assert not select.select([process.process.stdout], [], [], 0.5)[0], "nobody has asked for a step"
        assert process.step() > 0
    assert process.process.returncode is not None


def test_a_loop_that_fails_is_told_with_its_last_words(work, tmp_path):
    nowhere = replace(work, base=str(tmp_path / "nowhere"))
    with (
        TimedProcess("lora", nowhere, TRAINER, tmp_path) as process,
        pytest.raises(RunError, match=r"exit code 1: .*nowhere"),
    ):
        process.read("trained")
