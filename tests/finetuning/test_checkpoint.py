"""Folders that are complete or absent."""

from __future__ import annotations

import json
import os
import resource
from contextlib import contextmanager

import pytest

from finetuning.errors import InputError
from finetuning.run_folder import MANIFEST
from finetuning.training.checkpoint import Checkpoints
from finetuning.training.complete_folder import SaveError, damage, write_folder


class State:
    """Writes two files, and may fail between them."""

    def __init__(self, fail: Exception | None = None, size: int = 100, expected: int = 0):
        self.fail, self.bytes, self.expected = fail, size, expected

    def size(self):
        return self.expected

    def write(self, folder, step):
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_bytes(os.urandom(self.bytes))
        if self.fail:
            raise self.fail
        (folder / "step").write_text(str(step))


@contextmanager
def largest_file(size: int):
    """A real limit: writing more fails with EFBIG, as a full disk does with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_rotation_leaves_exactly_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=2)
    for step in (2, 4, 10, 20):
        checkpoints.save(step, State())
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]
    assert checkpoints.find("latest").name == "checkpoint-20"
    assert checkpoints.find("checkpoint-10") == checkpoints.find(str(tmp_path / "checkpoint-10"))


@pytest.mark.parametrize("fail", [OSError(28, "No space left on device"), RuntimeError("library")], ids=str)
def test_a_failed_save_loses_nothing(fail, tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, State())
    with pytest.raises(SaveError, match="checkpoint-1 stands"):
        checkpoints.save(2, State(fail))
    assert names(tmp_path) == ["checkpoint-1"]
    assert damage(tmp_path / "checkpoint-1") is None


def test_a_full_disk_is_said_with_the_size(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, State())
    with largest_file(50_000), pytest.raises(SaveError, match=r"kB are needed, .*checkpoint-1 stands"):
        checkpoints.save(2, State(size=1_000_000))
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_save_for_which_there_is_no_room_is_not_begun(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(SaveError, match=r"1000000000000\.0 MB are needed, .* free on the disk; there is no earlier"):
        checkpoints.save(1, State(expected=10**18))
    assert names(tmp_path) == []
    checkpoints.save(1, State())
    with pytest.raises(SaveError, match="checkpoint-1 stands"):
        checkpoints.save(2, State(fail=AssertionError("begun"), expected=10**18))


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, State(size=10))
    checkpoints.save(1, State(size=20))
    assert (tmp_path / "checkpoint-1" / "unet" / "weights").stat().st_size == 20
    assert names(tmp_path) == ["checkpoint-1"]


DAMAGES = {
    "missing file": lambda path: (path / "step").unlink(),
    "cut file": lambda path: (path / "unet" / "weights").write_bytes(b"x"),
    "changed bits": lambda path: (path / "unet" / "weights").write_bytes(b"x" * 100),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "cut manifest": lambda path: (path / MANIFEST).write_text("{"),
    "another manifest": lambda path: (path / MANIFEST).write_text(json.dumps({"step": 3})),
}


@pytest.mark.parametrize("spoil", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_or_refused(spoil, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, State())
    checkpoints.save(2, State())
    spoil(tmp_path / "checkpoint-2")
    assert checkpoints.find("latest").name == "checkpoint-1"
    assert f"checkpoint-2 is passed over: {damage(tmp_path / 'checkpoint-2')}" in caplog.text
    with pytest.raises(InputError, match="checkpoint-2"):
        checkpoints.find("checkpoint-2")
    spoil(tmp_path / "checkpoint-1")
    for overwrite in (False, True):  # which the shell scripts always ask for
        with pytest.raises(InputError, match=r"latest: every .* checkpoint-2 \(.*checkpoint-1 \(.*delete them or"):
            checkpoints.choose("latest", overwrite)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_damaged_later_checkpoint_does_not_push_out_new_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(4, State())
    DAMAGES["missing file"](tmp_path / "checkpoint-4")
    for step in (2, 3):
        checkpoints.save(step, State())
        assert checkpoints.find("latest").name == f"checkpoint-{step}"
    checkpoints.save(4, State())
    assert names(tmp_path) == ["checkpoint-4"] and damage(tmp_path / "checkpoint-4") is None


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_damaged_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, State())

    def killed(path, **_):
        if path.exists():
            (path / "step").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("finetuning.training.complete_folder.shutil.rmtree", killed)
        checkpoints.begin(is_new=True)
    assert checkpoints.find("latest") is None
    checkpoints.begin(is_new=False)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_ignored_and_cleared(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, State())
    (tmp_path / ".saving-2").mkdir()
    (tmp_path / ".saving-2" / "half").write_text("x")
    assert checkpoints.find("latest").name == "checkpoint-1"
    checkpoints.begin(is_new=False)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_kill_between_the_two_renames_of_a_replacement_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "unet"
    write_folder(path, lambda folder: (folder / "a").write_text("old"))
    renames = []
    rename = type(path).rename

    def killed(self, target):
        renames.append(self.name)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, lambda folder: (folder / "a").write_text("new"))
    left = [p for p in tmp_path.iterdir() if damage(p) is None]
    assert {(p / "a").read_text() for p in left} == {"old", "new"}


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, State())
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        checkpoints.choose(None)
    assert checkpoints.choose(None, overwrite=True) is None
    assert names(tmp_path) == ["checkpoint-1"], "choosing changes nothing yet"
    checkpoints.begin(is_new=True)
    assert names(tmp_path) == []
