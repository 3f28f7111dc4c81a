"""Data that is unusual and no fault: both trainers take it for what it is, and say once what they leave out."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
import yaml
from control_training import control_flags, control_folder, control_weights, run_control
from training import assert_same, flags, prior_flags, run, weights

from finetuning.run.run import Run

CUT = "--long_captions=cut: {} captions have more than the 24 tokens"
LONG = "a photo of qwe mug in the snow " * 5


@pytest.fixture
def said(caplog):
    """Lines of the log so far, of which that of long captions is one."""
    with caplog.at_level(logging.INFO):
        yield lambda: [message for message in caplog.messages if "--long_captions" in message]


def test_long_captions_of_photos_and_class_images_are_cut(toy_base, photos, tmp_path, said):
    """To the weights of a run whose captions say in as many tokens the same."""
    classes = tmp_path / "class"
    classes.mkdir()
    (photos / "2.png").rename(classes / "mine.png")
    arguments = [*prior_flags(classes, 1), "--long_captions=cut", "--max_train_steps=2"]

    def trained(name: str, caption: str):
        for path in (photos / "0.txt", classes / "mine.txt"):
            path.write_text(caption)
        assert run(*flags(toy_base, photos, tmp_path / name, *arguments)) == 0
        return weights(tmp_path / name)

    whole = trained("long", LONG)
    assert len(said()) == 1 and said()[0].startswith(CUT.format("2 of 2"))
    other = trained("other", "a photo of qwe dog")
    assert len(said()) == 1, "nothing is said of captions that can be read"
    assert_same(whole, trained("beginning", " ".join(LONG.split()[:22])))
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_long_captions_of_controls_are_cut(toy_base, tmp_path, said):
    folder = control_folder(tmp_path / "data", 4)

    def trained(name: str, caption: str, *more: str):
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({**line, "text": f"{caption} {i}"}) + "\n" for i, line in enumerate(lines))
        (folder / "metadata.jsonl").write_text(text)
        arguments = ["--long_captions=cut", "--max_train_steps=1", *more]
        assert run_control(*control_flags(toy_base, folder, tmp_path / name, *arguments)) == 0
        return control_weights(tmp_path / name)

    whole = trained("long", LONG)
    assert len(said()) == 1 and said()[0].startswith(CUT.format("4 of 4"))
    assert_same(whole, trained("precomputed", LONG, "--pre_compute_text_embeddings"))


def test_a_prompt_of_a_file_is_the_prompt(toy_base, photos, tmp_path):
    (tmp_path / "PROMPT.TXT").write_bytes(b"\xef\xbb\xbfa photo of qwe mug\r\n")
    more = [f"--instance_prompt={tmp_path / 'PROMPT.TXT'}", "--max_train_steps=1"]
    assert run(*flags(toy_base, photos, tmp_path / "output", *more)) == 0
    settings = yaml.safe_load((tmp_path / "output" / "config.yaml").read_text())
    assert settings["instance_prompt"] == "a photo of qwe mug"


def test_a_file_that_vanishes_in_training_is_one_line(toy_base, tmp_path, capsys, monkeypatch):
    """Also out of a worker: these controls are there when all are looked at, and gone when they are trained on."""
    folder, log = control_folder(tmp_path / "data", 3), Run.log

    def log_and_remove(self, step, **values):
        log(self, step, **values)
        for path in (folder / "controls").glob("*.png"):
            path.unlink()

    monkeypatch.setattr(Run, "log", log_and_remove)
    more = ["--dataloader_num_workers=1", "--max_train_steps=10", "--validation_steps=100"]
    assert run_control(*control_flags(toy_base, folder, tmp_path / "output", *more)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "controls/" in error[0] and "not a readable control" in error[0]
