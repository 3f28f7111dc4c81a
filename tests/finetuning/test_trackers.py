"""Trackers that are asked for and not there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

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
        monkeypatch.delitem(sys.modules, name)


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
