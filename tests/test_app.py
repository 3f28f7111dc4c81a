"""The page to try adapters: in a browser, a prompt is typed, a button pressed, two pictures come.

The README's picture:

RUNS=data/output SCREENSHOT=docs/app.webp PROMPT="a photo of qwe robot on the beach" python -m pytest -k two_pictures
"""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import draw_photo
from PIL import Image
from test_inference import MAKERS, write_run

from finetuning.adapters.pipelines import load_adapter, load_base
from finetuning.control.loading import load_control_run
from finetuning.control.network import HintEncoder
from finetuning.files import save_picture
from finetuning.pictures.generation import PictureOrder, draw
from finetuning.settings.reading import run_command
from scripts import app

SELECT_ALL, DELETE = "\ue009a\ue009", "\ue017"
WIDTHS = "return ['base', 'tuned'].map(id => document.querySelector(`#${id} img`)?.naturalWidth || 0)"
PIXELS = """return ['base', 'tuned'].map(id => {
    const canvas = document.createElement('canvas'), image = document.querySelector(`#${id} img`);
    canvas.width = canvas.height = 32;
    canvas.getContext('2d').drawImage(image, 0, 0, 32, 32);
    return canvas.toDataURL();
})"""


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory) -> Path:
    if "RUNS" in os.environ:
        return Path(os.environ["RUNS"])
    folder = tmp_path_factory.mktemp("app") / "output"
    for i, name in enumerate(("mug", "robot")):
        run = write_run(folder / name, toy_base, MAKERS["boft"], seed=i)
        settings = {"pretrained_model_name_or_path": str(toy_base), "num_inference_steps": 2, "guidance_scale": 3.0}
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"instance_prompt": "a photo of qwe mug"}))
    write_run(folder / "mug" / "checkpoint-2", toy_base, MAKERS["boft"])  # which is not offered
    return folder


@pytest.fixture(scope="module")
def page(runs):
    pytest.importorskip("gradio", reason="gradio is not installed (requirements-dev.txt)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--runs", str(runs), "--port", str(port)]
    threading.Thread(target=run_command, args=(app.main, arguments), daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    import gradio

    gradio.close_all(verbose=False)


def test_a_prompt_becomes_two_pictures(page, runs, browser, tmp_path):
    for _ in range(600):
        try:
            text = urllib.request.urlopen(page, timeout=5).read().decode()
            break
        except OSError:
            threading.Event().wait(0.1)
    assert '"analytics_enabled":false' in text.replace(" ", "")
    browser.ask("POST", "/window/rect", width=1280, height=720)
    browser.ask("POST", "/url", url=page)
    browser.wait("return document.querySelector('#draw')")
    labels = browser.run("return [...document.querySelectorAll('input[type=range]')].map(e => e.ariaLabel)")
    offered = [label for label in labels if "strength" in label]
    assert len(offered) == len(app.find_adapters(runs)) > 1 and not any("checkpoint" in label for label in offered)

    browser.press("#prompt textarea", SELECT_ALL + DELETE)
    browser.click("#draw")
    assert "the prompt is empty" in browser.wait("return document.querySelector('.toast-body')?.textContent")
    browser.click(".toast-close")
    browser.press("#prompt textarea", os.environ.get("PROMPT", "a photo of qwe mug in the snow"))
    browser.click("#draw")
    browser.wait(f"const widths = (() => {{ {WIDTHS} }})(); return Math.min(...widths) >= 500 && widths")
    base, tuned = browser.run(PIXELS)
    assert base != tuned and len(base) > 500
    foreign = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(origin))"
    assert not [name for name in browser.run(foreign) if not name.startswith(("data:", "blob:"))]
    assert not (complaints := browser.complaints()), complaints
    browser.screenshot(tmp_path / "app.png")
    with Image.open(tmp_path / "app.png") as shot:
        assert len(set(shot.convert("L").getdata())) > 50
        save_picture(shot, Path(os.environ.get("SCREENSHOT", tmp_path / "app.webp")))


def test_strengths_are_honoured(runs, toy_base):
    mug, robot = str(runs / "mug"), str(runs / "robot")
    easel = app.Easel(load_base(str(toy_base)), {mug: 1.0, robot: 0.0})
    order = PictureOrder("a red mug", seed=1, steps=2, size=easel.size)
    base, one = easel.draw(order, {mug: 1.0, robot: 0.0})
    assert easel.draw(order, {mug: 0.0, robot: 0.0}) == (base, base)
    again, both = easel.draw(order, {mug: 0.5, robot: 1.0})
    assert again == base and list(easel.loaded) == [mug, robot] and both not in (base, one)
    assert easel.draw(order, {mug: 1.0})[1] == one  # without loading anew
    pipeline = load_base(str(toy_base))
    assert draw(pipeline, [order]) == [base]
    load_adapter(pipeline, mug)
    assert draw(pipeline, [order]) == [one]


def test_a_control_is_followed_by_both_pictures_or_by_none(runs, toy_base, tmp_path):
    control_run = write_run(tmp_path / "control", toy_base, MAKERS["boft"], seed=7)
    settings = {"pretrained_model_name_or_path": str(toy_base), "conditioning_channels": 1}
    (control_run / "config.yaml").write_text(yaml.safe_dump(settings))
    torch.manual_seed(1)
    encoder = HintEncoder(1, 16, 2)
    torch.nn.init.normal_(encoder.layers[-1].weight, std=0.5)
    encoder.save_pretrained(control_run / "hint_encoder")
    mug, order = str(runs / "mug"), PictureOrder("a red mug", seed=1, steps=2, size=16)
    base, tuned = app.Easel(load_base(str(toy_base)), {mug: 1.0}).draw(order, {mug: 1.0})
    easel = app.Easel(load_control_run(control_run), {mug: 1.0}, control_run=control_run)
    assert easel.draw(order, {mug: 1.0}) == (base, tuned)  # without a control image there is no control
    controls = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(controls):
        draw_photo(3 * i, (16, 16)).convert("L").save(path)
    followed, other = (easel.draw(replace(order, control=str(path)), {mug: 1.0}) for path in controls)
    assert len({picture.tobytes() for picture in (base, tuned, *followed, *other)}) == 6
    assert easel.draw(order, {}) == (base, base)


def test_names_on_the_page_tell_runs_apart():
    assert app.unique_names(["runs/mug", "runs/robot"]) == ["mug", "robot"]
    assert app.unique_names(["a/mug", "b/mug"]) == ["a/mug", "b/mug"]


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    def fails(*arguments: object) -> str:
        assert run_command(app.main, [str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    with monkeypatch.context() as changed:
        changed.setattr(importlib.util, "find_spec", lambda name: None)
        assert "gradio is not installed; pip install gradio" in fails()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert "no adapter is below it" in fails("--runs", tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used" in fails("--runs", tmp_path, "--port", taken.getsockname()[1])
