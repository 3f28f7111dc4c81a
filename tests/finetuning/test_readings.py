"""Numbers that are read one step late, as on a GPU; here on the CPU, where the same code runs without its benefit."""

from __future__ import annotations

import math

import pytest
import torch
from training import assert_same, flags, metrics, prior_flags, run, weights

from finetuning.errors import RunError
from finetuning.randomness import integers, normal
from finetuning.readings import Reading, to_device
from finetuning.run.run import Run
from finetuning.training.optimizer import make_optimizer

VARYING = ("images_per_second", "peak_memory_gib", "seconds")  # beginnings of names


def late_run() -> tuple[Run, torch.nn.Parameter, torch.optim.Optimizer]:
    """A run that reads late, one parameter, and its optimizer as the trainers have it."""
    run = Run(seed=0)
    run.reads_late = True
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([{"params": [parameter], "lr": 0.1}], betas=(0.9, 0.999), epsilon=1e-8)
    return run, parameter, run.accelerator.prepare_optimizer(optimizer)


def step(run: Run, parameter: torch.nn.Parameter, optimizer, gradient: float) -> None:
    parameter.grad = torch.full_like(parameter, gradient)
    run.clip_gradients(optimizer, 1.0)
    optimizer.step()


def state(optimizer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for entry in optimizer.state_dict()["state"].values() for k, v in entry.items()}


def test_a_reading_gives_numbers_in_their_order():
    values = {"loss": torch.tensor(0.5), "rate": 0.1, "norm": torch.tensor([2.0])}
    assert Reading(values).values() == {"loss": 0.5, "rate": 0.1, "norm": 2.0}
    assert list(Reading(values).values()) == list(values)
    assert Reading({"rate": 0.1}).values() == {"rate": 0.1}


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_a_diverged_step_changes_nothing_and_is_told_by_the_next_one(gradient):
    run, parameter, optimizer = late_run()
    step(run, parameter, optimizer, 1.0)
    before, moments = parameter.detach().clone(), state(optimizer)
    step(run, parameter, optimizer, gradient)
    assert torch.equal(parameter, before)
    assert_same(state(optimizer), moments)
    with pytest.raises(RunError, match="has diverged"):
        step(run, parameter, optimizer, 1.0)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("end", ["flush", "check_same", "close"])
def test_no_checkpoint_is_made_of_a_diverged_step(end):
    run, parameter, optimizer = late_run()
    step(run, parameter, optimizer, math.nan)
    with pytest.raises(RunError, match="has diverged"):
        getattr(run, end)(*([optimizer] if end == "check_same" else []))


def test_reading_late_changes_no_bit_of_a_step():
    ends = []
    for late in (False, True):
        run, parameter, optimizer = late_run()
        run.reads_late = late
        for gradient in (1.0, -0.5, 3.0):
            step(run, parameter, optimizer, gradient)
        ends.append({"parameter": parameter.detach(), **state(optimizer)})
    assert_same(*ends)


def test_a_run_that_reads_late_has_the_same_log_and_weights(toy_base, photos, tmp_path, monkeypatch):
    more = (*prior_flags(tmp_path / "class"), "--validation_steps=2", "--checkpointing_steps=2")
    assert run(*flags(toy_base, photos, tmp_path / "at once", *more)) == 0
    begin = Run.__init__

    def begin_late(self, **options):
        begin(self, **options)
        self.reads_late = True

    monkeypatch.setattr(Run, "__init__", begin_late)
    assert run(*flags(toy_base, photos, tmp_path / "late", *more)) == 0
    assert_same(weights(tmp_path / "at once"), weights(tmp_path / "late"))
    for then, now in zip(metrics(tmp_path / "at once"), metrics(tmp_path / "late"), strict=True):
        assert list(then) == list(now)
        assert {k: v for k, v in now.items() if not k.startswith(VARYING)} == pytest.approx(
            {k: v for k, v in then.items() if not k.startswith(VARYING)}, rel=1e-5
        )


def test_random_numbers_are_the_same_wherever_they_are_wanted():
    keys, like = ["a", "b"], torch.zeros(1, dtype=torch.bfloat16)
    assert torch.equal(normal((3,), 0, "noise", keys, like), normal((3,), 0, "noise", keys).to(like))
    device = torch.device("cpu")
    assert torch.equal(integers(10, 0, "timestep", keys, device), integers(10, 0, "timestep", keys))
    assert to_device(torch.ones(2), torch.device("meta"), torch.float16).dtype == torch.float16
