"""One recipe for the shell scripts and for scripts/quickstart.py: which one is taken, and what changes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from finetuning.errors import InputError
from finetuning.recipes import (
    check_scored,
    control_command,
    dreambooth_command,
    flag_in,
    launch_command,
    recipe,
    threads,
)
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.reading import read_config, run_command
from finetuning.settings.shared import EMBEDDED_BASE
from scripts import quickstart

ROOT = Path(__file__).resolve().parent.parent
SPELLINGS = (
    "data/toyworld/base",
    "./data/toyworld/base",
    "data/toyworld/base/",
    "data/../data/toyworld//base",
    "link",
)


def dreambooth(*more: str, **environment: str) -> dict:
    """All settings that train_dreambooth.sh would train with."""
    return read_config(DreamBoothConfig, dreambooth_command(environment, None, more)).as_dict()


def control(*more: str, **environment: str) -> dict:
    """All settings that train_controlnet.sh would train with."""
    return read_config(ControlNetConfig, control_command(environment, more)).as_dict()


@pytest.mark.parametrize("spelling", [*SPELLINGS, EMBEDDED_BASE])
def test_the_embedded_base_is_known_by_its_folder(spelling, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "link").symlink_to(EMBEDDED_BASE)
    monkeypatch.chdir(tmp_path)
    for environment, more in (({"MODEL_NAME": spelling}, []), ({}, [f"--pretrained_model_name_or_path={spelling}"]),
                              ({"MODEL_NAME": "x/y"}, ["--pretrained_model_name_or_path", spelling])):  # fmt: skip
        for kind, told in (("dreambooth", dreambooth_command(environment, None, more)),
                           ("controlnet", control_command(environment, more))):  # fmt: skip
            assert flag_in(told, "--recipe") == f"{kind}-embedded"
            assert flag_in(told, "--pretrained_model_name_or_path") == spelling
        assert threads({}, spelling) and not threads({"OMP_NUM_THREADS": "3"}, spelling)


def test_other_models_have_the_other_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # in which the embedded base's relative name names nothing
    for name in ("some/model", "data/toyworld/base", str(tmp_path)):
        assert recipe("dreambooth", name) == "dreambooth" and not threads({}, name)
    told = dreambooth(MODEL_NAME="some/model", SUBJECT="robot")
    assert (told["resolution"], told["boft_block_num"], told["boft_block_size"]) == (512, 8, 0)
    assert told["class_data_dir"] == str(ROOT / "data" / "class_images" / "model" / "robot")
    assert control(MODEL_NAME="some/model")["dataset_name"] == "fusing/fill50k"


def test_the_shell_scripts_take_the_recipe_of_the_folder():
    """Each is told what is wrong with one recipe only: a split of the toy world, and fewer steps than warm it up."""
    for script, flag, fault in (
        ("train_controlnet.sh", "--held_out_split=x", "--held_out_split=x: needs --dataset_name of a data set"),
        ("train_dreambooth.sh", "--max_train_steps=7", "--lr_warmup_steps=20: more than --max_train_steps=7"),
    ):
        environment = {**os.environ, "MODEL_NAME": "./data/toyworld/base/", "PYTHON": sys.executable}
        done = subprocess.run(
            [f"./{script}", flag], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and done.stderr.startswith(f"error: {fault}"), done.stderr


def test_every_variable_changes_its_setting_alone():
    before = dreambooth()
    for variable, value, name in (
        ("STEPS", "50", "max_train_steps"), ("FACTORS", "3", "boft_n_butterfly_factor"),
        ("BLOCK_SIZE", "4", "boft_block_size"), ("LEARNING_RATE", "0.5", "learning_rate"),
        ("SCALE_RATE", "0.25", "boft_scale_learning_rate"), ("RESOLUTION", "32", "resolution"),
        ("NUM_CLASS_IMAGES", "3", "num_class_images"), ("REPORT_TO", "none", "report_to"),
        ("PROJECT_NAME", "p", "tracker_project_name"), ("RUN_NAME", "r", "wandb_run_name"),
        ("OUTPUT_DIR", "o", "output_dir"), ("CLASS_DIR", "c", "class_data_dir"),
        ("INSTANCE_DIR", "i", "instance_data_dir"), ("INSTANCE_PROMPT", "a qwe", "instance_prompt"),
        ("CLASS_PROMPT", "a mug", "class_prompt"),
    ):  # fmt: skip
        now = dreambooth(**{variable: value})
        changed = {key for key in now if now[key] != before[key]} - {"boft_block_num"}
        assert changed == {name} and str(value) in str(now[name]), variable
    now = dreambooth(VALIDATION_PROMPT="a qwe mug. In the snow")
    assert (now["validation_prompt"], now["base_prompt"]) == (["a qwe mug. In the snow"], [])
    before = control()
    for variable, value, name in (("CONDITIONING", "mask", "conditioning"), ("BATCH_SIZE", "2", "train_batch_size"),
                                  ("CONTROL_RATE", "0.5", "control_learning_rate")):  # fmt: skip
        now = control(**{variable: value})
        assert {key for key in now if now[key] != before[key]} == {name} and str(now[name]) == value
    now = dreambooth(MODEL_NAME="some/model", BLOCK_SIZE="4")
    assert (now["boft_block_num"], now["boft_block_size"]) == (0, 4), "one follows from the other"


def test_flags_and_files_of_the_user_count_last(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.25\nmax_train_steps: 99\n")
    now = dreambooth(f"--config={tmp_path / 'mine.yaml'}", "--max_train_steps=98", LEARNING_RATE="")
    assert (now["learning_rate"], now["max_train_steps"], now["train_batch_size"]) == (0.25, 98, 6)
    now = control("--train_data_dir=photos", "--conditioning=canny")
    assert (now["dataset_name"], now["train_data_dir"], now["conditioning"]) == (None, "photos", "canny")


def test_subjects_are_named_by_the_environment():
    assert dreambooth(SUBJECT="robot")["instance_data_dir"].endswith("robot")
    assert dreambooth()["instance_data_dir"].endswith("mug")
    with pytest.raises(InputError, match="SUBJECT=dragon: no such embedded subject"):
        dreambooth(SUBJECT="dragon")


def test_accelerate_starts_the_trainer_where_it_is_configured(tmp_path):
    assert launch_command({"HF_HOME": str(tmp_path)}) == [sys.executable]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    assert launch_command({"HF_HOME": str(tmp_path), "ACCELERATE": "--cpu --num_processes 2"}) == [
        *launch, "--cpu", "--num_processes", "2",
    ]  # fmt: skip
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").touch()
    assert launch_command({"HF_HOME": str(tmp_path)}) == launch


def test_what_cannot_be_scored_is_not_trained_first(capsys):
    check_scored(None, {}, ["--seed=1"])
    for arguments in (["dreambooth", "27"], ["dreambooth", "--instance_data_dir=photos"], ["dreambooht"]):
        assert run_command(quickstart.main, arguments) == 2
    said = capsys.readouterr().err
    assert said.count("add --only_train") == 2 and "dreambooht: must be dreambooth or controlnet" in said


def test_quickstart_trains_and_scores(tmp_path):
    """Control, cut short: a step, and eight pictures of the run and of the base."""
    environment = {**os.environ, "OUTPUT_DIR": str(tmp_path / "run"), "IMAGES": "2", "STEPS": "10"}
    small = ("--lr_warmup_steps=1", "--max_train_steps=1", "--num_inference_steps=1", "--train_batch_size=1",
             "--held_out_images=2", "--report_to=none")  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "controlnet", *small]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "evaluation" / "scores.json").read_text())
    assert [row["pictures"] for row in scores["table"]] == [2, 2, 2]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["max_train_steps"] == 1 and config["conditioning"] == "edges"


CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_a_signal_to_quickstart_reaches_the_trainer(tmp_path):
    command = f"[sys.executable, '-c', {CHILD!r}, 'up']"
    code = f"import sys; from scripts.quickstart import run; sys.exit(run({command}, {{}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    for _ in range(1000):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
