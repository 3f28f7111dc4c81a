"""Resuming from what was damaged, or belongs to another run: exit code 2, the reason, and nothing is changed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
from conftest import draw_photo
from safetensors.torch import load_file, save_file
from test_wrong_input import Case
from training import flags, metrics, run

from finetuning.run_folder import MANIFEST
from finetuning.training.complete_folder import listing


@pytest.fixture(scope="module")
def trained(toy_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    case = Case(folder, toy_base)
    assert run(*flags(toy_base, case.photos, case.output, "--checkpointing_steps=2", "--max_train_steps=2")) == 0
    return folder


def reseal(path: Path) -> None:
    """Make the manifest agree with what is there, so that the damage lies deeper."""
    (path / MANIFEST).unlink()
    (path / MANIFEST).write_text(json.dumps(listing(path)))


def no_torch_file(path: Path) -> None:
    (path / "training_state.pt").write_bytes(b"no state")
    reseal(path)


def dangerous(path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"optimizer": Harm()}, path / "training_state.pt")
    reseal(path)


def no_tensors(path: Path) -> None:
    (path / "unet" / "adapter_model.safetensors").write_bytes(b"no tensors")
    reseal(path)


def other_tensors(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path / "unet" / "adapter_model.safetensors")
    reseal(path)


DAMAGES = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), ["incomplete"]),
    "no weights": (lambda path: (path / "unet" / "adapter_model.safetensors").unlink(), ["is missing"]),
    "cut weights": (lambda path: os.truncate(path / "unet" / "adapter_model.safetensors", 50), ["50 bytes"]),
    "cut state": (lambda path: os.truncate(path / "training_state.pt", 50), ["training_state.pt has 50 bytes"]),
    "state of another kind": (no_torch_file, ["training_state.pt cannot be read"]),
    "state that would execute code": (dangerous, ["training_state.pt cannot be read"]),
    "weights of another kind": (no_tensors, ["cannot be loaded"]),
    "weights of another adapter": (other_tensors, ["other layers"]),
}


@pytest.mark.parametrize(("spoil", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint(spoil, words, trained, toy_base, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    spoil(folder / "output" / "checkpoint-2")
    before = {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}
    capsys.readouterr()
    arguments = flags(toy_base, folder / "photos", folder / "output", "--resume_from_checkpoint=checkpoint-2")
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert all(word in output.err for word in words), output.err
    assert "Traceback" not in output.err and "executed" not in output.out
    assert {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_second_run_into_the_same_folder(trained, toy_base, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    assert run(*flags(toy_base, folder / "photos", folder / "output")) == 2
    error = capsys.readouterr().err
    assert "--resume_from_checkpoint=latest" in error and "--overwrite_output_dir" in error


def test_resuming_on_another_base_model(trained, sd15_base, toy_base, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    base_copy = Path(shutil.copytree(toy_base, tmp_path / "base"))
    weights = base_copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    arguments = flags(base_copy, folder / "photos", folder / "output", "--resume_from_checkpoint=latest")
    assert run(*arguments) == 2
    assert "the checkpoint belongs to another base model" in capsys.readouterr().err


def test_resuming_on_other_photos(trained, toy_base, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    draw_photo(9).save(folder / "photos" / "0.png")
    assert run(*flags(toy_base, folder / "photos", folder / "output", "--resume_from_checkpoint=latest")) == 2
    assert "other images or captions" in capsys.readouterr().err


def test_latest_of_damaged_ones_begins_nothing(trained, toy_base, tmp_path, capsys):
    """Not even where everything else may be overwritten; an intact one, under any name, is taken."""
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    shutil.move(folder / "output" / "checkpoint-2", folder / "kept")
    shutil.copytree(folder / "kept", folder / "output" / "checkpoint-2")
    (folder / "output" / "checkpoint-2" / "training_state.pt").unlink()
    (folder / "output" / "checkpoint-4").mkdir()
    before = {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}
    arguments = flags(toy_base, folder / "photos", folder / "output", "--overwrite_output_dir", "--max_train_steps=2")
    assert run(*arguments, "--resume_from_checkpoint=latest") == 2
    error = capsys.readouterr().err
    assert "checkpoint-4 (manifest.json is missing, so it is incomplete), checkpoint-2 (training_state.pt" in error
    assert "delete them" in error and {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    more = ["--max_train_steps=3", "--checkpointing_steps=3"]
    assert run(*arguments, *more, f"--resume_from_checkpoint={folder / 'kept'}") == 0
    assert [line["step"] for line in metrics(folder / "output")] == [1, 2, 3]
