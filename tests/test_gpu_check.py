"""scripts/gpu_check.py, rehearsed on the CPU by its real command, without the packages that trainers can spare."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetuning.settings import studies as settings
from finetuning.studies.gpu_check import machine
from finetuning.studies.gpu_check.supervisor import STAGES, Stage, supervise

ROOT = Path(__file__).resolve().parents[1]
HELPING = Path(__file__).resolve().parent / "gpu_check_stages"
HIDDEN = "wandb,tensorboard,datasets,cv2,matplotlib,gradio,bitsandbytes"
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(HELPING), **variables},
        cwd="/",
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder of a rehearsal of all stages, and how the command ended."""
    folder = tmp_path_factory.mktemp("gpu_check")
    arguments = ("--output", folder, "--device", "cpu", "--tiny", "--minutes", "10")
    return folder, command(*arguments, HIDDEN_PACKAGES=HIDDEN)


def content(folder: Path, stage: str) -> dict:
    return json.loads((folder / f"{stage}.json").read_text())


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_all_stages_leave_numbers(rehearsed):
    folder, done = rehearsed
    assert done.returncode == 0, done.stdout + (folder / "log.txt").read_text()[-3000:]
    for stage in STAGES:
        left = content(folder, stage)
        assert left["status"] == "done", left
        assert all(math.isfinite(number) for number in numbers(left["results"])) and numbers(left["results"])
        assert f"## {stage}" in (folder / "summary.md").read_text()


def test_what_it_finds_is_printed(rehearsed):
    _, done = rehearsed
    assert f"torch {machine.installed('torch')}" in done.stdout and "torch_geometric" not in done.stdout
    assert "Python 3." in done.stdout and "device " in done.stdout


def test_identities_hold(rehearsed):
    left = content(rehearsed[0], "identities")
    identities = {name: row for name, row in left["results"].items() if name != "all"}
    assert left["results"]["all"]["hold"] == len(identities) >= 26
    assert not [name for name, row in identities.items() if not row["holds"]]
    assert not [name for name in left["errors"] if not name.startswith("compiled")]


def test_places_where_the_host_waits_are_named(rehearsed):
    waits = content(rehearsed[0], "synchronisations")["results"]
    for name in ("step of train_dreambooth.py, float32", "step of train_controlnet.py, float32"):
        places = waits[name]["places"]
        assert waits[name]["waits"] == sum(place["times"] for place in places)
        for place in places:
            file, line = place["place"].split()[0].rsplit(":", 1)
            assert (ROOT / file).read_text().splitlines()[int(line) - 1].strip() == place["code"]


def test_trainers_run_without_the_packages_that_they_can_do_without(rehearsed):
    folder, _ = rehearsed
    left = content(folder, "trainer")
    assert not left["errors"]
    for run in ("dreambooth, float32", "dreambooth, bfloat16", "controlnet, bfloat16"):
        assert left["results"][run]["steps"] == 2 and left["results"][run]["images_per_second"] > 0
    assert "edge_f1" not in left["results"]["controlnet, bfloat16"]  # which OpenCV would find, and is said:
    assert "edges are not scored: OpenCV is not installed" in (folder / "log.txt").read_text()
    assert 0 <= left["results"]["controlnet, bfloat16"]["mask_miou"] <= 1
    assert set(left["results"]["scores"]) == {"base", "float32"}


def test_a_run_that_was_killed_ends_with_the_same_bits(rehearsed):
    for name, resumed in content(rehearsed[0], "trainer")["results"].items():
        if name.startswith("resumed"):
            assert resumed["run_again_has_the_same_bits"] and resumed["resumed_has_the_same_bits"], name


def test_every_candidate_is_measured_on_every_shape(rehearsed):
    left = content(rehearsed[0], "cost")
    assert not left["errors"]
    shapes = {name: rows for name, rows in left["results"].items() if not name.endswith("compiled")}
    assert [name.split(",")[0] for name in shapes] == ["SD 1.5", "SDXL", "FLUX.2-klein-4B", "Z-Image"]
    for rows in shapes.values():
        assert len(rows) == 8
        for name, row in rows.items():
            assert row["step_ms"] > 0 and row["step_to_lora"] > 0, (name, row)
            assert name == "frozen" or (row["trained"] > 0 and row["inference_to_base"] > 0)
            assert not name.startswith("ours") or row["solving_share"] > 0
    compiled = left["results"]["SD 1.5, tiny, compiled"]
    assert all(row.get("step_ms", 0) > 0 or row["error"] for row in compiled.values()) and len(compiled) == 3


def test_ways_to_invert_agree_and_kernels_are_counted(rehearsed):
    left = content(rehearsed[0], "kernels")
    assert not left["errors"]
    ways = {name: rows for name, rows in left["results"].items() if name.startswith("Cayley")}
    assert len(ways) == 8
    for rows in ways.values():
        assert len(rows) == 7 and all(row["ms"] > 0 for row in rows.values())
        assert all(value < 1e-5 for row in rows.values() for key, value in row.items() if key.startswith("error"))
    for name, profile in left["results"].items():
        if name.startswith("kernels"):
            assert len(profile["costliest"]) == 15 and profile["launches_a_step"] > 15
            assert 0 <= profile["idle_share"] <= 1


def test_nothing_is_written_outside_the_folder(rehearsed):
    folder, _ = rehearsed
    assert {path.name for path in folder.iterdir()} == {
        *(f"{stage}.json" for stage in STAGES), "summary.md", "log.txt", "runs", "cache",
    }  # fmt: skip


@pytest.fixture
def helping_stages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HELPING))


def test_a_stage_that_fails_is_put_down_and_the_next_one_runs(tmp_path, helping_stages):
    shares = {"raises": 1, "dies": 1, "hangs": 0.1, "works": 1}
    stages = {name: Stage(f"stage_{name}", share) for name, share in shares.items()}
    said: list[str] = []
    begun = time.monotonic()
    assert not supervise(stages, "cpu", True, tmp_path, 60, said.append)
    assert time.monotonic() - begun < 75  # what is left over is shared by those that follow
    left = {name: content(tmp_path, name) for name in stages}
    assert all(row["results"]["one"] == {"value": 1.0} for row in left.values())
    assert [row["status"] for row in left.values()] == ["failed", "failed", "stopped at its share of the time", "done"]
    assert left["raises"]["errors"]["the stage"].startswith("ValueError: this stage cannot go on")
    assert left["raises"]["errors"]["two"].startswith("ZeroDivisionError")
    assert "exit code 3" in left["dies"]["errors"]["the stage"]
    assert left["works"]["left_out"] == ["long"]
    assert [line for line in said if "failed" in line or "stopped" in line or "done" in line]


def test_only_the_stages_that_are_asked_for(tmp_path):
    assert tuple(STAGES) == settings.STAGES
    done = command("--output", tmp_path, "--only", "stage_of_nobody")
    assert done.returncode == 2 and "stage_of_nobody" in done.stderr and "kernels" in done.stderr
    assert not list(tmp_path.iterdir())
    done = command("--output", tmp_path, "--only", "identities", "--device", "cpu", "--tiny", "--minutes", "0.02")
    assert done.returncode == 0, done.stderr
    left = content(tmp_path, "identities")  # of a second and its grace
    assert left["status"] == "stopped at its share of the time" or len(left["left_out"]) > 10
    assert left.get("seconds", 0) < 10 or left["status"] != "done"
    assert {path.stem for path in tmp_path.glob("*.json")} == {"identities"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cpu"), "--device=cpu: real shapes would take hours there; add --tiny"),
        (("--minutes", "0"), "--minutes=0.0: must be greater than 0"),
        (("--device", "cuda", "--only", "kernels"), "--device=cuda: torch"),
    ],
)
def test_wrong_input_is_told_in_a_line(tmp_path, arguments, said):
    if "cuda" in arguments and machine.installed("torch") and Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    done = command("--output", tmp_path / "out", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    done = command("--output", tmp_path / "out", HIDDEN_PACKAGES="yaml")
    assert done.returncode == 2 and done.stderr.startswith("error: yaml is not installed; pip install")
    monkeypatch.setattr(machine, "NEEDED", ("torch", "no-such-package"))
    with pytest.raises(machine.InputError, match="not installed: no-such-package"):
        machine.packages(ROOT / "constraints.txt")
    monkeypatch.setattr(machine, "NEEDED", ("torch",))
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==0.1; python_version < '3.11'\ntorch==0.2  # another\n")
    assert any(line.endswith("(tested: 0.1, 0.2)") for line in machine.packages(constraints))
