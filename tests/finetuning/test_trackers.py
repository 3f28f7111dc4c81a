"""Trackers that are asked for and not there, or that refuse to begin a run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from training import flags, run

from finetuning.errors import InputError
from finetuning.run.trackers import tracker_names


@pytest.fixture
def without_wandb(tmp_path, monkeypatch):
    """No wandb is installed; a folder comes first where packages are looked for. Returns it."""
    folder = tmp_path / "beside the script"
    folder.mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.find_spec("wandb")
    if spec is not None:
        installed = str(Path(spec.origin).parents[1])
        monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if p != installed)])
    else:
        monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        del sys.modules[name]  # not by monkeypatch, which would bring it back


def test_a_folder_of_its_name_is_no_tracker(without_wandb):
    with pytest.raises(InputError, match="wandb is not installed; pip install wandb"):
        tracker_names("wandb")
    (without_wandb / "wandb").mkdir()
    with pytest.raises(InputError, match="wandb is not installed; pip install wandb"):
        tracker_names("wandb")


@pytest.mark.parametrize("content", ["x = 1", "raise RuntimeError('broken')", "import nothing_of_this_name"])
def test_neither_is_a_module_of_its_name(content, without_wandb):
    (without_wandb / "wandb.py").write_text(content)
    with pytest.raises(InputError, match=r"--report_to=wandb: wandb \(.*wandb.py\) cannot be used"):
        tracker_names("wandb")


@pytest.fixture
def forgotten_wandb():
    """wandb keeps the first settings of a process for good, where later runs would find them."""
    yield
    import wandb

    wandb.teardown()


NOBODY = "http://127.0.0.1:9"  # where no server listens


def everything_in(folder: Path, but: str) -> dict[str, bytes]:
    """The content of each file in a folder, without those that lie in one of its folders."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(name): (folder / name).read_bytes() for name in files if name.parts[0] != but}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "1"}, "connection refused"),
    ],
    ids=["a bad key", "no network"],
)
def test_a_wandb_that_refuses_is_a_message_and_nothing_that_stood_is_touched(
    environment, says, toy_base, photos, tmp_path, monkeypatch, forgotten_wandb, capfd
):
    pytest.importorskip("wandb")
    output = tmp_path / "output"
    more = ("--max_train_steps=2", "--checkpointing_steps=1")
    assert run(*flags(toy_base, photos, output, *more)) == 0
    before = everything_in(output, but="wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in {"WANDB_BASE_URL": NOBODY, **environment}.items():
        monkeypatch.setenv(name, value)
    capfd.readouterr()
    assert run(*flags(toy_base, photos, output, *more, "--overwrite_output_dir"), "--report_to=all") == 2
    message = capfd.readouterr().err
    assert "--report_to=all: wandb cannot begin a run" in message and says in message
    assert "Traceback" not in message and "WANDB_MODE=offline" in message
    assert everything_in(output, but="wandb") == before
