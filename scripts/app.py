#!/usr/bin/env python
"""A page to try what was trained: a prompt, the strength of each adapter, the base model beside the tuned one.

    pip install gradio -c constraints.txt
    python scripts/app.py                                     # the adapters found in data/output
    python scripts/app.py --adapter runs/mug runs/robot --port 7861
    python scripts/app.py --control data/output/controlnet    # and a control image, if one is given on the page

The page is served to this machine alone, loads nothing from elsewhere and reports nothing to anybody.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.inference import AdapterChoice, AppConfig
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(AppConfig, __doc__)  # before the slow imports

from PIL import Image

from finetuning.adapters.choice import find_base, find_run_setting, parse_adapter
from finetuning.adapters.folder import ADAPTABLE_PARTS, ADAPTER_CONFIG, check_same_base, local_folder, trained_on
from finetuning.adapters.pipelines import get_strengths, load_adapter, load_base, strengths, unload_adapter
from finetuning.control.loading import load_control_run
from finetuning.control.pipeline import read_controls, without_control
from finetuning.errors import InputError
from finetuning.pictures.generation import PictureOrder, check_size, draw
from finetuning.run.device import choose_device
from finetuning.run_folder import CONFIG

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HERE = "127.0.0.1"
SHOWN = 512  # side in pixels to which smaller pictures are enlarged on the page
LARGEST_SEED = 2**32 - 1


class Easel:
    """A base model on which adapters are put when somebody asks for them.

    Args:
        pipeline: what `load_base` has loaded, or `load_control_run` with what its run has trained.
        adapters: the strength of each adapter that the page begins with, by path.
        any_base: also load adapters that were trained on another base.
        control_run: the run that the control of the pipeline comes from, if it has one.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        adapters: dict[str, float],
        any_base: bool = False,
        control_run: Path | None = None,
    ) -> None:
        self.pipeline, self.adapters, self.any_base, self.control_run = pipeline, adapters, any_base, control_run
        self.loaded: dict[str, str] = {}  # the adapters on the pipeline beside the control's: {path: name there}
        self.plain = pipeline if control_run is None else without_control(pipeline)
        self.of_control = list(get_strengths(pipeline))
        self.size = check_size(None, pipeline)
        self._lock = Lock()

    def draw(self, order: PictureOrder, wanted: dict[str, float]) -> tuple[Image.Image, Image.Image]:
        """Draw by the base model, and by the base model with adapters, from the same noise.

        Both pictures follow the control of the order, if it has one.

        Args:
            order: what is drawn.
            wanted: the strength of each adapter, by path.

        Raises:
            InputError: if an adapter or the control cannot be read, or two adapters cannot be loaded together.
        """
        wanted = {path: strength for path, strength in wanted.items() if strength}
        pipeline = self.plain if order.control is None else self.pipeline
        controls = read_controls([order], pipeline)
        with self._lock:
            if not wanted.keys() <= self.loaded.keys():
                self.load(wanted)
            following = dict.fromkeys(self.of_control, float(order.control is not None))
            at_work = {name: wanted.get(path, 0.0) for path, name in self.loaded.items()}
            with strengths(self.pipeline, {**at_work, **following}):
                (tuned,) = draw(pipeline, [order], controls=controls)
            with strengths(self.pipeline, {**dict.fromkeys(at_work, 0.0), **following}):
                (base,) = draw(pipeline, [order], controls=controls)
        return base, tuned

    def load(self, wanted: dict[str, float]) -> None:
        """Replace the adapters on the pipeline by these, which begin at strength 0."""
        unload_adapter(self.pipeline)
        self.loaded = {}
        if self.control_run is not None and self.of_control:
            self.of_control = [load_adapter(self.pipeline, self.control_run, 0.0)]
        for path in wanted:
            self.loaded[path] = load_adapter(self.pipeline, path, 0.0, check_base=not self.any_base)


def main(argv: Sequence[str] | None = None) -> None:
    open_page(read_config(AppConfig, argv, __doc__))


def open_page(config: AppConfig) -> None:
    """Load the base and the adapters, and serve the page until it is interrupted."""
    page, choice = config.page, config.adapters
    if importlib.util.find_spec("gradio") is None:
        raise InputError("scripts/app.py: gradio is not installed; pip install gradio")
    check_port(page.port)
    if not choice.adapter and page.control is None:
        newest, *others = find_adapters(Path(page.runs))
        choice = replace(choice, adapter=[newest, *(f"{path}:0" for path in others)])
    control_run = None if page.control is None else local_folder(page.control)
    if control_run is None:
        name, options = choice.pretrained_model_name_or_path, {}
        if name is None:
            name, options = find_base(parse_adapter(choice.adapter[0])[0])
        pipeline = load_base(name, **options, device=choose_device(page.device))
    else:
        pipeline = load_control_run(control_run, choose_device(page.device))
    easel = Easel(pipeline, of_this_base(choice, pipeline.name_or_path), choice.any_base, control_run)
    look = {
        "steps": find_run_setting(choice, "num_inference_steps", 25),
        "guidance_scale": find_run_setting(choice, "guidance_scale", 7.5),
    }
    prompts = find_run_setting(choice, "validation_prompt", [])
    prompt = prompts[0] if prompts else find_run_setting(choice, "instance_prompt", "")
    print(f"adapters: {', '.join(easel.adapters) or 'none'}\nthe page: http://{HERE}:{page.port}", flush=True)
    serve(easel, prompt, look, page.port)


def check_port(port: int) -> None:
    """Check that no other program uses a port of this machine.

    Raises:
        InputError: if one does.
    """
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((HERE, port))
        except OSError as error:
            raise InputError(f"--port={port}: cannot be used ({error.strerror}); give another") from error


def find_adapters(folder: Path) -> list[str]:
    """Find the runs below a folder that hold adapters, newest first. Checkpoints of a run do not count.

    Raises:
        InputError: if there is none.
    """
    found = [
        config.parent
        for config in folder.rglob(CONFIG)
        if not config.parent.name.startswith("checkpoint-")
        and any((config.parent / part / ADAPTER_CONFIG).is_file() for part in ADAPTABLE_PARTS)
    ]
    if not found:
        raise InputError(f"--runs={folder}: no adapter is below it; train one, or give --adapter or another folder")
    return [str(run) for run in sorted(found, key=lambda run: (run / CONFIG).stat().st_mtime, reverse=True)]


def of_this_base(choice: AdapterChoice, base: str) -> dict[str, float]:
    """The strengths of the chosen adapters, by path. Those of another base are left out, and a line says so."""
    kept = {}
    for path, strength in map(parse_adapter, choice.adapter):
        try:
            if not choice.any_base:
                check_same_base(base, trained_on(local_folder(path)), path)
            kept[path] = strength
        except InputError as error:
            print(f"left out: {error}")
    return kept


def serve(easel: Easel, prompt: str, look: dict[str, float], port: int) -> None:
    """Serve the page until the program is interrupted."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio

    with gradio.Blocks(title="Try what was trained", analytics_enabled=False) as blocks, gradio.Row():
        inputs, events = ask(easel, prompt, look)
        with gradio.Column(scale=3), gradio.Row():
            plain: dict[str, Any] = {"format": "png", "type": "pil", "interactive": False, "buttons": ["download"]}
            pictures = [
                gradio.Image(label="base model", elem_id="base", **plain),
                gradio.Image(label="tuned", elem_id="tuned", **plain),
            ]
        for event in events:
            queue = {"concurrency_limit": 1, "concurrency_id": "easel"}
            event(partial(answer, easel), inputs, pictures, api_name=False, **queue)
    system = ["system-ui", "sans-serif"]  # gradio's own fonts come from the network
    blocks.launch(
        server_name=HERE,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gradio.themes.Default(font=system, font_mono=["monospace"]),
    )


def ask(easel: Easel, prompt: str, look: dict[str, float]) -> tuple[list, list[Callable]]:
    """Build the column of inputs. Returns them in the order of `answer`'s arguments, and the events that draw."""
    import gradio

    with gradio.Column(scale=2):
        prompt_box = gradio.Textbox(prompt, label="Prompt", lines=2, elem_id="prompt")
        sliders = [
            gradio.Slider(0, 1.5, strength, step=0.05, label=f"{name}: strength")
            for name, strength in zip(unique_names(list(easel.adapters)), easel.adapters.values())
        ]
        with gradio.Row():
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            steps = gradio.Slider(1, 100, look["steps"], step=1, label="Denoising steps")
            guidance = gradio.Slider(0, 15, look["guidance_scale"], step=0.5, label="Guidance")
        control = gradio.Image(
            label="Control image, e.g. edges",
            type="filepath",
            format="png",
            image_mode=None,
            sources=["upload", "clipboard"],
            visible=easel.control_run is not None,
            elem_id="control",
        )
        button = gradio.Button("Draw", variant="primary", elem_id="draw")
    return [prompt_box, seed, steps, guidance, control, *sliders], [button.click, prompt_box.submit]


def answer(
    easel: Easel,
    prompt: str,
    seed: float | None,
    steps: float,
    guidance_scale: float,
    control: str | None,
    *given: float,
) -> tuple[Image.Image, ...]:
    """Draw what was typed: the base model's picture and the tuned one. given: the strength of each adapter."""
    import gradio

    try:
        if not prompt.strip():
            raise InputError("the prompt is empty")
        if seed is None or not 0 <= seed <= LARGEST_SEED or seed != int(seed):
            raise InputError(f"seed {seed}: must be a whole number from 0 to {LARGEST_SEED}")
        order = PictureOrder(
            prompt,
            int(seed),
            steps=int(steps),
            guidance_scale=guidance_scale,
            size=easel.size,
            control=control,
        )
        return tuple(map(enlarged, easel.draw(order, dict(zip(easel.adapters, given)))))
    except InputError as error:
        raise gradio.Error(str(error), print_exception=False) from error


def unique_names(paths: Sequence[str]) -> list[str]:
    """The names of the folders, with as many of the folders above them as it takes to tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def enlarged(picture: Image.Image) -> Image.Image:
    """Enlarge a small picture by a whole number, so that the browser does not blur it unevenly."""
    times = max(1, SHOWN // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: open_page(config)))
