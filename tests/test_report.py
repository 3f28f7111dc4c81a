"""The report of a run: what is in it, and that it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import draw_photo
from test_evaluation import load_script

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

from finetuning.files import save_picture
from finetuning.pictures.grid import grid
from finetuning.publishing.report import POINTS, charts, thinned
from finetuning.run_folder import read_metrics
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.reading import run_command

report = load_script("report")


def make_run(folder: Path, steps: int = 300) -> Path:
    """What a run leaves, in the trainer's formats."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    config = defaults(DreamBoothConfig) | {
        "instance_prompt": "a photo of qwe <mug>", "instance_data_dir": "photos", "use_boft": True,
        "boft_block_size": 8, "boft_n_butterfly_factor": 2, "max_train_steps": steps, "learning_rate": 8e-3,
        "validation_prompt": ["a qwe mug in the snow", "a qwe mug on the beach"], "resolution": 64,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            loss, prior = (0.05 + 0.3 * np.exp(-step / 60)) * random.lognormal(0, 0.3, 2)
            line = {"step": step, "loss": loss + prior, "instance_loss": loss, "prior_loss": prior}
            line |= {"learning_rate": 8e-3 * (1 - step / steps), "gradient_norm": 0.1 * random.lognormal(0, 0.4)}
            line |= {"images_per_second": 18 + random.normal(), "peak_memory_gib": 1.1}
            line |= {"rotation_degrees": 12 * (1 - np.exp(-step / 100))} if step % 50 == 0 else {}
            file.write(json.dumps(line) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "held_out_instance_loss": 0.1 + 10 / step}) + "\n")
        file.write('{"step": 301, "lo')  # as a killed process leaves it
    for i, step in enumerate((100, 200, 300)):
        rows = [[draw_photo(7 * i + k, (64, 64)) for k in range(5)] for _ in range(2)]
        columns = [f"a photo of qwe mug {k}" for k in range(5)]
        save_picture(grid(rows, columns=columns), folder / "validation" / f"validation-{step:06d}.png")
    save_picture(grid(rows, captions=["before", "after"], columns=columns), folder / "comparison.png")
    scores = {"subject": 0.61, "subject_new": 0.55, "context": 0.9, "drift": 0.041}
    (folder / "scores.json").write_text(json.dumps({"base": dict.fromkeys(scores, 0.02), "tuned": scores}))
    prompts = [
        {"prompt": f"a qwe mug {k}", "pictures": 2, "excluded": k, "DINO": 0.5, "CLIP-T": 0.2} for k in range(2)
    ]
    pictures = [{"DINO": 0.4, "CLIP-T": 0.2}, {"DINO": 0.6, "CLIP-T": 0.3}, {"DINO": None, "CLIP-T": None}]
    (folder / "evaluation").mkdir()
    found = {"prompts": prompts, "by_picture": pictures, "real": {"DINO": 0.8}}
    (folder / "evaluation" / "scores.json").write_text(json.dumps(found))
    return folder


def make_control_run(folder: Path) -> Path:
    """What a run of control leaves after 100 steps."""
    folder.mkdir(parents=True)
    config = defaults(ControlNetConfig) | {
        "dataset_name": "toyworld", "conditioning": "mask", "use_boft": True, "boft_block_size": 8,
        "max_train_steps": 100, "learning_rate": 1e-3, "conditioning_channels": 1,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(101):
            if step:
                file.write(json.dumps({"step": step, "loss": 0.1 + 1 / step, "learning_rate": 1e-3}) + "\n")
            if step % 50 == 0:
                line = {"step": step, "held_out_loss": 0.2, "edge_f1": 0.4 + step / 400, "mask_miou": 0.75}
                file.write(json.dumps(line) + "\n")
    for step in (0, 50, 100):
        rows = [[draw_photo(step + 4 * i + k, (64, 64)) for k in range(4)] for i in range(3)]
        picture = grid(rows, captions=["control", "result", "overlay"])
        save_picture(picture, folder / "validation" / f"held-out-{step:06d}.png")
    save_picture(picture, folder / "validation" / "consistency.png")
    save_picture(picture, folder / "comparison.png")
    table = [{"pictures of": name, "pictures": 4, "edge_f1": 0.625} for name in ("controlled", "real pictures")]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "scores.json").write_text(json.dumps({"drawing": {}, "table": table}))
    return folder


def defaults(kind: type) -> dict[str, object]:
    """All settings of a trainer."""
    return {name: v for group in typing.get_type_hints(kind).values() for name, v in vars(group()).items()}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("report") / "mug")
    assert run_command(report.main, [str(run)]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def control_page(tmp_path_factory) -> Path:
    run = make_control_run(tmp_path_factory.mktemp("report") / "control")
    assert run_command(report.main, [str(run)]) == 0
    return run / "report.html"


def test_a_report_is_self_contained_and_complete(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and not re.search(
        r"@import|fetch\(|https?://(?!www.w3)", text
    )
    assert "a photo of qwe &lt;mug&gt;" in text and "<mug>" not in text
    assert text.count('data-step="') == 3 and "Before and after" in text and "BOFT, m = 2, b = 8" in text
    for words in ("Judged by the toy world", "0.610", "real photos", "0.800", "boft_scale_learning_rate", "torch"):
        assert words in text, words
    data = json.loads(re.search(r'id="charts">(.*?)</script>', text)[1])
    curves = {curve["name"]: curve["points"] for chart in data for curve in chart["curves"]}
    assert [step for step, _ in curves["loss"]] == list(range(1, 301))
    assert len(curves["held out instance loss"]) == 3 and len(curves["rotation degrees"]) == 6


def test_a_run_of_control_has_a_report(control_page):
    text = control_page.read_text()
    for words in ("Control: mask", "light control and BOFT, m = 1, b = 8", "Held-out controls", "Held-out over steps",
                  "How the control is followed", "0.625", "found again", "Images and controls"):  # fmt: skip
        assert words in text, words
    assert text.count('data-step="') == 3 and "<h3>Other" not in text and "full fine-tuning" not in text
    data = json.loads(re.search(r'id="charts">(.*?)</script>', text)[1])
    assert [curve["name"] for curve in data[0]["curves"]] == ["edge f1", "mask miou"], "the signal comes first"
    assert data[0]["curves"][0]["points"] == [[0, 0.4], [50, 0.525], [100, 0.65]]


def test_a_run_that_has_just_begun_has_a_report(page, tmp_path):
    shutil.copy(page.parent / "config.yaml", tmp_path)
    assert run_command(report.main, [str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "Configuration" in text and "<h2>Curves" not in text and "Before and after" not in text


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert run_command(report.main, [str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: not the output of a training run")
    (tmp_path / "config.yaml").write_text("[")
    assert run_command(report.main, [str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_long_curves_are_drawn_by_means():
    points = [(step, float(step % 2)) for step in range(100_000)]
    few = thinned(points)
    assert len(few) <= POINTS
    assert np.mean([value for _, value in few[:-1]]) == pytest.approx(0.5, abs=0.01)
    assert thinned(points[:50]) == points[:50]


def test_unknown_metrics_get_a_chart_and_undefined_values_none(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"step": 1, "new": 1}\n{"step": 2, "new": NaN}\n{"step": 3, "new": 3}\nnonsense\n'
    )
    (chart,) = charts(read_metrics(tmp_path / "m.jsonl"))
    assert chart == {"title": "new", "is_noisy": False, "curves": [{"name": "new", "points": [(1, 1), (3, 3)]}]}


# In a browser


LEFT = "\ue012"  # WebDriver's arrow key
SHOWN = (
    "return [...document.querySelectorAll('.album img')].filter(i => i.offsetHeight > 0)"
    ".map(i => Number(i.dataset.step))"
)


def test_the_slider_moves_and_nothing_fails(page, control_page, browser):
    browser.ask("POST", "/url", url=control_page.as_uri())
    browser.press(".album input", LEFT)
    assert browser.run(SHOWN) == [50]
    assert not (complaints := browser.complaints()), complaints
    browser.screenshot(control_page.with_suffix(".png"))

    browser.ask("POST", "/url", url=page.as_uri())
    assert browser.run("return document.title") == "a photo of qwe <mug>"
    assert browser.run(SHOWN) == [300]
    browser.press(".album input", LEFT)
    assert browser.run(SHOWN) == [200]
    assert browser.run("return document.querySelector('output').textContent") == "step 200"
    browser.press(".album input", LEFT + LEFT)
    assert browser.run(SHOWN) == [100]
    images = "return [...document.images].map(i => i.naturalWidth)"
    assert min(browser.run(images)) > 0
    drawn = browser.run("return [...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('path').length)")
    assert len(drawn) == 7 and drawn[0] == 6 and min(drawn) >= 1
    path = browser.run("return [...document.querySelectorAll('.chart path')].map(p => p.getAttribute('d')).join()")
    assert "NaN" not in path and "Infinity" not in path
    browser.run("document.querySelector('.chart svg').dispatchEvent(new PointerEvent('pointermove', {clientX: 640}))")
    assert "at step" in browser.run("return document.querySelector('.legend').textContent")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not (complaints := browser.complaints()), complaints
    browser.screenshot(page.with_suffix(".png"))
    assert page.with_suffix(".png").stat().st_size > 10_000
