"""Wrong input to train_controlnet.py: exit code 2, a few lines with flag, value, remedy; nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import numpy as np
import pytest
from conftest import draw_photo
from control_training import control_flags, control_folder, run_control, saved_dataset
from PIL import Image


class Case:
    """A folder of images with controls, and the flags of a run on it."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, control_folder(folder / "data", 4)

    def without(self, name: str):
        (self.data / name).unlink()

    def metadata(self, change):
        path = self.data / "metadata.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))

    def save(self, name: str, image: Image.Image):
        image.save(self.data / name)

    def dataset(self, *flags: str):
        return ["--no_data", f"--dataset_name={saved_dataset(self.folder / 'set', 4, 24)}", *flags]

    def partners(self, *names: str):
        (self.folder / "partners").mkdir()
        for name in names:
            draw_photo(1).save(self.folder / "partners" / name)
        return [f"--conditioning_data_dir={self.folder / 'partners'}"]


def held_out(case: Case, caption: str) -> Path:
    folder = Path(shutil.copytree(case.data, case.folder / "held"))
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines).replace("a photo of 0", caption))
    return folder


def array(case: Case, values: np.ndarray):
    np.save(case.data / "controls" / "0.npy", values)
    case.metadata(lambda line: {**line, "conditioning_image": "controls/0.npy"})


# name: (what is done, or flags; words that the error must hold)
CASES = {
    # Data
    "no data": (["--no_data"], ["--dataset_name", "--train_data_dir", "neither"]),
    "two kinds of data": (["--dataset_name=toyworld"], ["both"]),
    "no such folder": (["--train_data_dir=/nowhere"], ["--train_data_dir=/nowhere", "no such folder"]),
    "no such data set": (["--no_data", "--dataset_name=/nowhere"], ["--dataset_name=/nowhere", "cannot be loaded"]),
    "no such image": (lambda case: case.without("1.png"), ["metadata.jsonl, line 2", "1.png"]),
    "no such control": (lambda case: case.without("controls/2.png"), ["line 3", "controls/2.png"]),
    "no captions": (["--caption_column=words"], ["--caption_column=words", "file_name, text, conditioning_image"]),
    "no controls": (
        lambda case: case.metadata(lambda line: {"file_name": line["file_name"], "text": "a"}),
        ["--conditioning_image_column=conditioning_image", "--conditioning_data_dir"],
    ),
    "not even metadata": (
        lambda case: case.without("metadata.jsonl"), ["--train_data_dir", "no metadata.jsonl", "--conditioning"]
    ),
    "broken metadata": (
        lambda case: (case.data / "metadata.jsonl").write_text("{}\n") and None, ["line 1", "file_name"]
    ),
    "a missing column": (
        lambda case: case.dataset("--conditioning_image_column=map"),
        ["--conditioning_image_column=map", "image, conditioning_image, text, long"],
    ),
    "a missing split": (lambda case: case.dataset("--held_out_split=test"), ["--held_out_split=test", "train"]),
    "a column without images": (
        lambda case: case.dataset("--image_column=text"), ["column text", "not an image", "--image_column"]
    ),
    "partners that are missing": (
        lambda case: case.partners("0.png", "3.png"), ["--conditioning_data_dir", "1.png, 2.png", "the same"]
    ),
    "no partners at all": (lambda case: case.partners(), ["no control for 0.png, 1.png, 2.png, 3.png"]),
    "no folder of partners": (["--conditioning_data_dir=/nowhere"], ["--conditioning_data_dir=/nowhere"]),
    "nothing left to train on": (["--held_out_images=4"], ["--held_out_images=4", "4 samples"]),
    "no text for a caption": (
        lambda case: case.metadata(lambda line: {**line, "text": None}), ["line 1: the caption is null", "write a"]
    ),
    "a long caption": (
        lambda case: case.metadata(lambda line: {**line, "text": "mug " * 30}),
        ["metadata.jsonl, line 1: a caption of 32 tokens", "reads 24", "--long_captions=cut"],
    ),
    "a long caption of a sample that is held out": (
        lambda case: [f"--held_out_data_dir={held_out(case, 'mug ' * 30)}"],
        ["held/metadata.jsonl, line 1: a caption of 32 tokens", "--long_captions=cut"],
    ),
    "a long caption of a data set": (
        lambda case: case.dataset("--caption_column=long"), ["row 3 (from 0) of split train", "--long_captions=cut"]
    ),
    "captions that are not UTF-8": (
        lambda case: (case.data / "metadata.jsonl").write_bytes(b"caf\xe9") and None, ["is not UTF-8", "save it"]
    ),
    "a folder of controls as a data set": (
        lambda case: ["--no_data", f"--dataset_name={case.data}"],
        ["column conditioning_image: is str", "--train_data_dir", "conditioning_image_file_name"],
    ),
    # Controls
    "another size": (
        lambda case: case.save("controls/1.png", draw_photo(1, (24, 20))), ["24×24", "24×20", "make them the same"]
    ),
    "a corrupt control": (
        lambda case: (case.data / "controls" / "1.png").write_bytes(b"no image") and None, ["1.png", "not a readable"]
    ),
    "too few channels": (["--conditioning_channels=4"], ["--conditioning_channels=4", "3 channels"]),
    "too many channels": (["--conditioning_channels=1"], ["--conditioning_channels=1", "3 channels"]),
    "an array of another width": (
        lambda case: array(case, np.zeros((24, 24, 5))), ["--conditioning_channels=3", "5 channels"]
    ),
    "an array of numbers that are none": (
        lambda case: array(case, np.full((24, 24), np.nan)), ["controls/0.npy", "not finite"]
    ),
    "an array of unknown range": (
        lambda case: array(case, np.full((24, 24), 7)), ["controls/0.npy: int64 from 7 to 7"]
    ),
    "an array out of range": (lambda case: array(case, np.full((24, 24), 7.0)), ["7", "must lie in [0, 1]"]),
    "an unknown condition": (["--conditioning=cany"], ["--conditioning=cany", "canny"]),
    "thresholds the wrong way round": (["--conditioning=canny", "--canny_low=300"], ["--canny_low=300"]),
    "edges of real pictures": (["--conditioning=edges"], ["--conditioning=edges", "canny"]),
    "segments without a network": (["--conditioning=mask"], ["--conditioning=mask", "--segmentation_model"]),
    "a network that is not there": (
        ["--conditioning=mask", "--segmentation_model=/nowhere"], ["--segmentation_model=/nowhere", "cannot be loaded"]
    ),
    # The toy world
    "no end": (["--no_data", "--dataset_name=toyworld", "--no_steps"], ["--max_train_steps", "no end"]),
    "a cache without an end": (
        ["--no_data", "--dataset_name=toyworld", "--cache_latents"], ["--cache_latents", "--max_train_samples"]
    ),
    # Kinds of control
    "an unknown control": (["--controlnet=heavy"], ["--controlnet=heavy", "light, full"]),
    "a ControlNet for light control": (
        ["--controlnet=light", "--controlnet_model_name_or_path=x"], ["--controlnet_model_name_or_path=x", "full"]
    ),
    "no such ControlNet": (
        ["--controlnet=full", "--controlnet_model_name_or_path=/nowhere"], ["/nowhere", "cannot be loaded"]
    ),
    # Validation
    "a prompt without a control": (["--validation_prompt=a mug"], ["--validation_image", "both or neither"]),
    "two controls for three prompts": (
        ["--validation_image", "a", "b", "--validation_prompt", "a", "b", "c"], ["2 images for 3"]
    ),
    "no such control to draw by": (
        ["--validation_image=/nowhere.png", "--validation_prompt=a"], ["--validation_image=/nowhere.png"]
    ),
    # What the other trainer has
    "a text encoder to train": (["--train_text_encoder"], ["unknown flag --train_text_encoder"]),
    "class images": (["--with_prior_preservation"], ["unknown flag --with_prior_preservation"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CASES.values(), ids=CASES)
def test_wrong_input(change, words, toy_base, tmp_path, capsys):
    case = Case(tmp_path)
    more = list(change) if isinstance(change, list) else change(case) or []
    arguments = control_flags(toy_base, case.data, tmp_path / "output")
    for mark, flag in (("--no_data", "--train_data_dir"), ("--no_steps", "--max_train_steps")):
        if mark in more:
            more.remove(mark)
            arguments = [a for a in arguments if not a.startswith(flag)]
    before = {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run_control(*arguments, *more) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error and len(error.splitlines()) <= 6
    assert {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
