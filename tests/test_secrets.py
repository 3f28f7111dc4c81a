"""Real command lines with a secret in them: the program gets it, and nothing that it leaves or starts shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
from conftest import draw_photo
from control_training import control_flags, control_folder
from test_hub import TOKEN, Hub, holding
from training import flags

from finetuning.errors import InputError
from finetuning.settings import secrets as secret_flags
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.inference import PushConfig
from finetuning.settings.reading import read_config

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"train_dreambooth": DreamBoothConfig, "train_controlnet": ControlNetConfig, "push": PushConfig}
NEEDED = ["--instance_data_dir=photos", "--instance_prompt=a photo of qwe mug", "--push_to_hub"]


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def start(hub: Hub, folder: Path, *command: object, **more: str) -> subprocess.CompletedProcess:
    """A program in a process of its own, for which `hub` is the hub; it has no token but the one it is given."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN_PATH": "/nonexistent/token", **more,
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_programs_have_the_secrets_that_are_tried_here():
    for name, config in PROGRAMS.items():
        assert [*secret_flags._flags(config)] == ["--hub_token"], f"{name} has more: try it below, too"


def test_the_trainers_and_push_get_the_token_and_nothing_shows_it(hub, toy_base, tmp_path):
    """A wrong token would end each of them before its first step: see `Answer.answer`."""
    (tmp_path / "photos").mkdir()
    draw_photo(0).save(tmp_path / "photos" / "0.png")
    control_folder(tmp_path / "data")
    more = ("--max_train_steps=1", "--report_to=all", "--push_to_hub")
    runs = {
        "train_dreambooth.py": flags(toy_base, tmp_path / "photos", tmp_path / "mug", *more, "--hub_token", TOKEN),
        "train_controlnet.py": control_flags(
            toy_base, tmp_path / "data", tmp_path / "control", *more, f"--hub_token={TOKEN}"
        ),
        "scripts/push.py": [f"--run={tmp_path / 'mug'}", f"--hub_token={TOKEN}", "--hub_model_id=me/again"],
    }
    for script, arguments in runs.items():
        hub.files.clear()
        done = start(hub, tmp_path, ROOT / script, *arguments)
        assert done.returncode == 0, done.stderr
        assert "unet/adapter_model.safetensors" in hub.files, "uploaded, which needs the token"
        assert TOKEN not in done.stdout + done.stderr, script
        assert not [name for name, content in hub.files.items() if TOKEN.encode() in content], script
    for run in ("mug", "control"):
        assert (tmp_path / run / "wandb").is_dir() and (tmp_path / run / "logs").is_dir()
    assert not holding(tmp_path, TOKEN)


PROCESS = """
import json, os, pathlib, sys
import psutil
sys.path.insert(0, {root!r})
from finetuning.run.launch import launch
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.inference import PushConfig
config = launch(DreamBoothConfig)
said = {{"token": config.tracking.hub_token, "seed": config.optimization.seed, "argv": sys.argv,
         "seen": psutil.Process().cmdline(), "environment": dict(os.environ)}}
pathlib.Path(os.environ["RANK"] + ".json").write_text(json.dumps(said))
"""


def test_processes_that_the_trainer_starts_itself_get_the_token_unseen(hub, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROCESS.format(root=str(ROOT)))
    token = "1"  # also in other arguments, which must stay
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=2")
    done = start(hub, tmp_path, *launcher, script, *NEEDED, "--hub_token", token, "--seed=111")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (said["token"], said["seed"]) == (token, 111)
        assert secret_flags.VARIABLE not in said["environment"]
        for words in (said["argv"], said["seen"]):
            assert words[words.index("--hub_token") + 1] == "***" and words[-1] == "--seed=111"


def test_a_trainer_that_a_script_starts_gets_the_token_unseen(hub, tmp_path):
    """The hub refuses another's name, which it says only to a token that it accepts."""
    name = ("--push_to_hub", "--hub_model_id=you/mug", "--report_to=none")
    script = (ROOT / "scripts" / "quickstart.py", "dreambooth", "--only_train")
    done = start(hub, tmp_path, *script, "--hub_token", TOKEN, *name, OUTPUT_DIR="run", CLASS_DIR="class")
    assert done.returncode == 2 and "owners that fit: me, lab, club" in done.stderr, done.stderr
    assert TOKEN not in done.stderr and not holding(tmp_path, TOKEN)
    config = secret_flags.hand_over(DreamBoothConfig, ["--seed=1", f"--hub_token={TOKEN}"])
    assert config == ["--seed=1", "--hub_token=***"]
    assert secret_flags.receive(DreamBoothConfig, config) == ["--seed=1", f"--hub_token={TOKEN}"]


WRONG = {
    "text that cannot be": (["--hub_token=s3cr3t\0"], None),
    "a list": ([], "hub_token: [s3cr3t]\n"),
    "without what it is for": (["--no_push_to_hub", "--hub_token=s3cr3t"], None),
    "misspelt": (["--hub_tokn", "s3cr3t"], None),
    "misspelt, with =": (["--hub_tokn=s3cr3t"], None),
}


@pytest.mark.parametrize("case", WRONG)
def test_no_message_shows_a_secret(case, tmp_path):
    more, text = WRONG[case]
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
        more = [f"--config={tmp_path / 'run.yaml'}"]
    with pytest.raises(InputError, match="hub_tok") as caught:
        read_config(DreamBoothConfig, [*NEEDED, *more])
    assert "s3cr3t" not in str(caught.value) and len(caught.value.faults) == 1


def test_a_configuration_does_not_show_its_secrets():
    config = read_config(DreamBoothConfig, [*NEEDED, "--hub_token=s3cr3t"])
    assert config.tracking.hub_token == "s3cr3t" and "s3cr3t" not in repr(config)
