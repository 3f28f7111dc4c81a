"""A short DreamBooth run on the embedded base teaches the subject, by a judge that had no part in training."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from finetuning.adapters.pipelines import load_base, load_run
from toyworld import CONTEXTS
from toyworld.measure import generate
from toyworld.scores import Judges

ROOT = Path(__file__).parents[1]
TOYWORLD = ROOT / "data" / "toyworld"
STEPS = 100  # of the 250 that the shell script takes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shell script, on the embedded cat, cut short."""
    folder = tmp_path_factory.mktemp("dreambooth")
    settings = {
        "SUBJECT": "cat",
        "STEPS": str(STEPS),
        "NUM_CLASS_IMAGES": "16",
        "REPORT_TO": "none",
        "OUTPUT_DIR": str(folder / "run"),
        "CLASS_DIR": str(folder / "class"),
    }
    subprocess.run([ROOT / "train_dreambooth.sh", "--seed=1"], env=os.environ | settings, check=True, timeout=900)
    return folder / "run"


@pytest.mark.slow
def test_the_subject_is_recognised_and_the_prompt_obeyed(run):
    judges = Judges(TOYWORLD / "judge", "cat")
    prompts = [f"a photo of qwe cat {context}" for context in CONTEXTS]
    before = generate(load_base(str(TOYWORLD / "base")), prompts, range(10), steps=15)
    draw = partial(generate, load_run(run), seeds=range(10), steps=15)
    after = draw(prompts)
    read = judges.attributes.read(after)
    assert judges.subject_score(before) < 0.3
    assert judges.subject_score(after) > max(0.45, judges.subject_score(before) + 0.3)
    assert (read[:, 3] == np.arange(len(CONTEXTS))).mean() >= 0.7
    assert judges.subject_score(draw(["a photo of a red cat in the snow"] * 10)) < 0.4  # others are still others


@pytest.mark.slow
def test_the_run_leaves_what_it_should(run):
    for name in (
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
        "config.yaml",
        "comparison.png",
        "README.md",
    ):
        assert (run / name).stat().st_size > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert (lines[-1]["step"], json.loads((run / "unet" / "adapter_config.json").read_text())["peft_type"]) == (
        STEPS,
        "BOFT",
    )


@pytest.mark.slow
def test_the_code_on_the_card_draws_the_picture(run):
    code = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    *lines, last = code.strip().splitlines()
    scope: dict = {}
    exec("\n".join(lines), scope)
    scope["pipeline"].set_progress_bar_config(disable=True)
    image = scope["pipeline"]("a photo of qwe cat in the snow", num_inference_steps=2).images[0]
    assert last.startswith('pipeline("a photo of qwe cat"')
    assert image.size == (64, 64) and np.asarray(image).std() > 5


@pytest.mark.slow
def test_the_code_in_the_readme_draws_the_picture(run, tmp_path, monkeypatch):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(ROOT)
    code = code.replace("data/output/dreambooth", str(run)).replace("mug.png", str(tmp_path / "mug.png"))
    exec(code, {})
    assert (tmp_path / "mug.png").stat().st_size > 1000
