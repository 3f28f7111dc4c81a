"""Seeded mutations of what people edit, copy and break: settings, flags, checkpoints, adapters.

Each ends in the right result or in one message with exit code 2: never in a traceback, a hang, or a changed input.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
import yaml
from conftest import draw_photo
from control_training import control_flags, control_folder
from fuzzing import ODD_VALUES, disturb, disturb_state, odd_file, outcome
from safetensors.torch import load_file
from test_inference import answer
from training import BOFT, flags
from training import run as train

from finetuning.adapters.pipelines import load_adapter, load_base, unload_adapter
from finetuning.control.loading import load_control_run
from finetuning.control.network import new_controlnet, new_hint_encoder
from finetuning.run_folder import MANIFEST
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.fields import fields_of
from finetuning.settings.reading import read_config
from finetuning.training.complete_folder import listing
from scripts import export, generate, merge
from train_controlnet import ControlNet
from train_dreambooth import DreamBooth

NEEDED = ["--instance_data_dir=photos", "--instance_prompt=a qwe mug"]
NAMES = [field.name for _, field in fields_of(read_config(DreamBoothConfig, NEEDED))]
ODD_ARGUMENTS = ("\udcff", "a\0b", "=", "-", "--", "-1e3", "--seed", "/dev/null", "*")
LORA = ("--use_lora", "--rank=2")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(toy_base, tmp_path_factory) -> Path:
    """A folder with photos, data with controls, and two runs: `boft` and, with other settings, `lora`."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "photos").mkdir()
    draw_photo(0).save(folder / "photos" / "0.png")
    control_folder(folder / "data", count=2)
    shutil.copytree(toy_base, folder / "base")
    for name, adapter in (("boft", BOFT), ("lora", LORA)):
        steps = ("--max_train_steps=2", "--checkpointing_steps=1", "--train_batch_size=1")
        assert train(*flags(folder / "base", folder / "photos", folder / name, *steps, adapter=adapter)) == 0
    unet = load_base(str(folder / "base")).unet
    new_hint_encoder(unet, 2, 3).save_pretrained(folder / "light" / "hint_encoder")
    new_controlnet(unet, 2, 3).save_pretrained(folder / "full")
    for name, adapter in (("light", BOFT), ("full", ())):
        argv = control_flags(folder / "base", folder / "data", folder / name, adapter=adapter)
        read_config(ControlNetConfig, argv).save(folder / name / "config.yaml")
    return folder


# Settings


def build(trainer: type, config: type) -> Callable:
    """A trainer's own work until all is checked, before it writes."""

    def main(argv):
        trainer(read_config(config, argv))

    return main


@pytest.mark.parametrize("seed", range(50))
def test_files_of_settings(seed, world, tmp_path, capsys):
    draw = random.Random(seed)
    trainer, config, argv = DreamBooth, DreamBoothConfig, flags(world / "base", world / "photos", tmp_path / "output")
    if seed % 3 == 2:
        trainer, config = ControlNet, ControlNetConfig
        argv = control_flags(world / "base", world / "data", tmp_path / "output")
    good = yaml.safe_dump(read_config(config, argv).as_dict(), sort_keys=False)
    (tmp_path / "run.yaml").write_bytes(odd_file(draw, good))
    needed = argv[:4] if seed % 2 else []
    outcome(build(trainer, config), [f"--config={tmp_path / 'run.yaml'}", *needed], tmp_path, capsys)


@pytest.mark.parametrize("seed", range(30))
def test_flags(seed, world, tmp_path, capsys):
    draw = random.Random(seed)
    argv = flags(world / "base", world / "photos", tmp_path / "output")
    for _ in range(draw.choice((1, 1, 1, 2))):
        value = draw.choice((*ODD_VALUES, *ODD_ARGUMENTS, str(world)))
        flag, place = f"--{draw.choice([*NAMES, 'config', 'no_seed'])}", draw.randrange(len(argv) + 1)
        argv[place:place] = draw.choice(([f"{flag}={value}"], [flag, value], [flag]))
    outcome(build(DreamBooth, DreamBoothConfig), argv, world, capsys)
    assert not (tmp_path / "output").exists()


# Folders


def reseal(folder: Path) -> None:
    """Make the list of files agree with what is there, so that the damage lies deeper."""
    manifest = folder / MANIFEST
    if manifest.is_dir():
        manifest.rmdir()
    manifest.unlink(missing_ok=True)
    manifest.write_text(json.dumps(listing(folder)))


@pytest.mark.parametrize("seed", range(35))
def test_checkpoints(seed, world, tmp_path, capsys):
    draw = random.Random(seed)
    output = Path(shutil.copytree(world / "boft", tmp_path / "output"))
    folder = output / "checkpoint-2"
    if draw.random() < 0.3:
        disturb_state(folder / "training_state.pt", draw)
    else:
        disturb(folder, draw.choice((world / "lora" / "checkpoint-2", output / "checkpoint-1")), draw)
    if draw.random() < 0.6:
        reseal(folder)
    made, which = [], draw.choice(("latest", "checkpoint-2", str(folder)))
    more = ("--max_train_steps=2", "--train_batch_size=1", f"--resume_from_checkpoint={which}")
    argv = flags(world / "base", world / "photos", output, *more)
    if outcome(lambda argv: made.append(DreamBooth(read_config(DreamBoothConfig, argv))), argv, output, capsys) == 0:
        (trainer,) = made
        assert trainer.training.first_step == 2 if which != "latest" else trainer.training.first_step in (1, 2)
        stored = load_file(output / f"checkpoint-{trainer.training.first_step}" / "unet" / "adapter_model.safetensors")
        loaded = trainer.adapters["unet"].state()
        assert stored.keys() == loaded.keys() and all(torch.equal(stored[n].float(), loaded[n]) for n in stored)


@pytest.fixture(scope="module")
def pipeline(world):
    return load_base(str(world / "base"))


@pytest.mark.parametrize("seed", range(40))
def test_adapters(seed, world, pipeline, tmp_path, capsys):
    draw = random.Random(seed)
    own, other = draw.choice((("boft", "lora"), ("lora", "boft")))
    folder = Path(shutil.copytree(world / own / "unet", tmp_path / "run" / "unet"))
    shutil.copy(world / own / "config.yaml", tmp_path / "run")
    place = draw.choice((tmp_path / "run", tmp_path / "run", folder))
    disturb(draw.choice((folder, folder, place)), world / other, draw)
    base = answer(pipeline)
    if seed % 4:
        code = outcome(lambda argv: load_adapter(pipeline, place) and None, [], tmp_path / "run", capsys)
    else:
        script, more = draw.choice((
            (merge, [f"--output_dir={tmp_path / 'merged'}"]),
            (export, ["--format=lora", f"--output={tmp_path / 'x.safetensors'}"]),
            (export, ["--format=peft", f"--output={tmp_path / 'peft'}"]),
            (export, ["--format=single-file", f"--output={tmp_path / 'y.safetensors'}"]),
            (generate, ["--prompt=a mug", "--num_inference_steps=1", f"--output_dir={tmp_path / 'drawn'}"]),
        ))  # fmt: skip
        code = outcome(script.main, [f"--adapter={place}", *more], tmp_path / "run", capsys)
        assert code == 0 or {path.name for path in tmp_path.iterdir()} == {"run"}, "something was written"
    if code == 0:
        assert torch.isfinite(answer(pipeline)).all()
    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), base)


@pytest.mark.parametrize("seed", range(20))
def test_controls(seed, world, tmp_path, capsys):
    """Hint encoders and ControlNets, which diffusers would fill up with random numbers."""
    draw = random.Random(seed)
    kind, part = draw.choice((("light", "hint_encoder"), ("full", ".")))
    run = Path(
        shutil.copytree(world / kind, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "validation"))
    )
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    (tmp_path / "part").mkdir()
    for name in names:  # what is disturbed is one of them
        (run / part / name).rename(tmp_path / "part" / name)
    disturb(tmp_path / "part", world / ("full" if kind == "light" else "light"), draw)
    for path in (tmp_path / "part").iterdir():
        path.rename(run / part / path.name)
    made = []
    if outcome(lambda argv: made.append(load_control_run(run)), [], run, capsys) == 0:
        pipeline = made[0]
        loaded = (pipeline.hint_encoder if kind == "light" else pipeline.controlnet).state_dict()
        stored = load_file(run / part / names[1])
        assert stored.keys() == loaded.keys() and all(torch.equal(stored[n].float(), loaded[n]) for n in stored)
        assert all(torch.isfinite(tensor).all() for tensor in stored.values())
