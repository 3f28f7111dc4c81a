"""train_controlnet.py from flags to files: what a run leaves, that it resumes to the bit, and how it is scored."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import numpy as np
import pytest
import torch
from conftest import draw_photo
from control_training import control_flags, control_folder, control_weights, run_control, saved_dataset
from diffusers import ControlNetModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file
from training import assert_same, metrics, optimizer_of

from finetuning.control.loading import load_control_run
from finetuning.control.network import new_controlnet
from finetuning.errors import InputError
from finetuning.models.loading import load_stable_diffusion
from finetuning.pictures.generation import read_parameters
from finetuning.run.run import Run
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.reading import read_config, run_command
from finetuning.studies.comparison.grid import read_grid
from scripts import compare_controls, evaluate, generate

SMALL = ("--checkpointing_steps=2", "--validation_steps=4", "--random_flip", "--proportion_empty_prompts=0.3",
         "--control_learning_rate=1e-3", "--boft_dropout=0.3", "--lr_scheduler=linear")  # fmt: skip
FULL = ("--checkpointing_steps=2", "--validation_steps=4", "--use_ema", "--mixed_precision=bf16")


@pytest.fixture(scope="module")
def finished(toy_base, tmp_path_factory) -> Path:
    """Data, and a light run on it: four steps, a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("control")
    control_folder(folder / "data")
    assert run_control(*control_flags(toy_base, folder / "data", folder / "output", *SMALL)) == 0
    return folder


def test_what_a_light_run_leaves(finished):
    output = finished / "output"
    assert {p.name for p in output.iterdir()} == {
        "checkpoint-2", "checkpoint-4", "hint_encoder", "unet", "validation", "comparison.png", "config.yaml",
        "environment.json", "metrics.jsonl", "README.md",
    }  # fmt: skip
    assert {p.name for p in (output / "validation").iterdir()} == {
        "consistency.png", "held-out-000000.png", "held-out-000004.png",
    }  # fmt: skip
    lines = metrics(output)
    assert [line["step"] for line in lines if "edge_f1" in line] == [0, 4]
    assert {"held_out_loss", "edge_f1", "edge_iou"} <= lines[0].keys()
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    linear = np.array([1, 0.75, 0.5, 0.25])
    rates = {name: [line[name] for line in lines if "loss" in line] for name in lines[1] if "learning_rate" in name}
    assert rates.keys() == {"learning_rate", "learning_rate_hint_encoder"}
    np.testing.assert_allclose(rates["learning_rate"], 1e-2 * linear)
    np.testing.assert_allclose(rates["learning_rate_hint_encoder"], 1e-3 * linear)
    early, late = (control_weights(output / name) for name in ("checkpoint-2", "checkpoint-4"))
    assert_same(late, control_weights(output))
    for part in ("unet", "hint_encoder"):
        assert any(not torch.equal(early[name], late[name]) for name in early if name.startswith(part)), part


def test_generate_by_a_control(finished, tmp_path, capsys):
    draw_photo(3, (20, 16)).save(tmp_path / "control.png")
    more = [f"--output_dir={tmp_path / 'out'}", "--prompt", "a mug", "a dog", "--num_inference_steps=1"]
    arguments = ["--adapter", str(finished / "output"), f"--control={tmp_path / 'control.png'}", *more]
    generate.main([*arguments, "--controlnet_conditioning_scale=0.5", "--strength=0,1"])
    pictures = list((tmp_path / "out").glob("a-*.png"))
    assert len(pictures) == 4
    assert {read_parameters(p)["control_scale"] for p in pictures} == {0.5}
    assert run_command(generate.main, [*arguments, "--base"]) == 2
    assert run_command(generate.main, [*more, f"--control={tmp_path / 'control.png'}"]) == 2
    assert run_command(generate.main, ["--adapter", str(finished / "output"), "--control=/nowhere.png", *more]) == 2
    error = capsys.readouterr().err
    assert "no meaning with --control" in error and "needs one --adapter" in error and "no such file" in error


def test_the_result_draws_by_a_control(finished):
    pipeline = load_control_run(finished / "output")
    control = draw_photo(3, (16, 16))

    def draw(scale):
        options = {"controlnet_conditioning_scale": scale, "generator": torch.Generator().manual_seed(0)}
        return np.asarray(pipeline("a mug", image=control, num_inference_steps=2, **options).images[0], float)

    assert np.abs(draw(1.0) - draw(0.0)).max() > 1


def test_a_resumed_full_run_equals_the_run_left_alone(finished, toy_base, tmp_path):
    alone, resumed = (
        control_flags(toy_base, finished / "data", tmp_path / name, *FULL, adapter=()) for name in ("alone", "resumed")
    )
    assert run_control(*alone) == 0
    shutil.copytree(tmp_path / "alone" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert run_control(*resumed, "--resume_from_checkpoint=latest") == 0
    assert_same(control_weights(tmp_path / "alone"), control_weights(tmp_path / "resumed"))
    assert_same(*(optimizer_of(tmp_path / name / "checkpoint-4") for name in ("alone", "resumed")))


def test_a_signal_saves_both_parts_and_the_run_goes_on_to_the_same_bits(finished, toy_base, tmp_path, monkeypatch):
    arguments = control_flags(toy_base, finished / "data", tmp_path / "output", *SMALL)
    log = Run.log

    def log_and_signal(self, step, **values):
        log(self, step, **values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_signal)
        assert run_control(*arguments) == 143
    assert {p.name for p in (tmp_path / "output" / "checkpoint-3").iterdir()} >= {"unet", "hint_encoder"}
    assert run_control(*arguments, "--resume_from_checkpoint=latest") == 0
    assert_same(control_weights(finished / "output"), control_weights(tmp_path / "output"))
    assert_same(*(optimizer_of(folder / "output" / "checkpoint-4") for folder in (finished, tmp_path)))


def test_diffusers_own_invocation(sd15_base, tmp_path):
    """As diffusers' example tests ask it of their script: the data set alone is local here."""
    output = tmp_path / "output"
    arguments = [
        f"--pretrained_model_name_or_path={sd15_base}",
        f"--dataset_name={saved_dataset(tmp_path / 'fill10')}",
        f"--output_dir={output}",
        "--resolution=64",
        "--train_batch_size=1",
        "--gradient_accumulation_steps=1",
        "--checkpointing_steps=2",
        "--num_inference_steps=1", "--held_out_images=1", "--report_to=none",  # shorter, not other
    ]  # fmt: skip
    assert run_control(*arguments, "--max_train_steps=6", "--checkpoints_total_limit=2") == 0
    assert {p.name for p in output.iterdir() if "checkpoint" in p.name} == {"checkpoint-4", "checkpoint-6"}
    control = ControlNetModel.from_pretrained(output)
    ControlNetModel.from_pretrained(output / "checkpoint-6", subfolder="controlnet")
    assert control.config.conditioning_channels == 3

    resume = ["--resume_from_checkpoint=checkpoint-6", "--checkpoints_total_limit=2"]
    assert run_control(*arguments, "--max_train_steps=8", *resume) == 0
    assert {p.name for p in output.iterdir() if "checkpoint" in p.name} == {"checkpoint-6", "checkpoint-8"}


def test_a_controlnet_to_go_on_from_and_controls_to_draw_by(finished, toy_base, tmp_path):
    arguments = control_flags(toy_base, finished / "data", tmp_path / "output", "--max_train_steps=1", adapter=())
    new_controlnet(load_stable_diffusion(str(toy_base)).unet, 2, 3).save_pretrained(tmp_path / "control")
    draw_photo(1, (64, 64)).save(tmp_path / "control.png")
    shown = [f"--validation_image={tmp_path / 'control.png'}", "--validation_prompt", "a mug", "a dog"]
    more = [f"--controlnet_model_name_or_path={tmp_path / 'control'}", "--learning_rate=0", "--validation_steps=1"]
    assert run_control(*arguments, *shown, *more) == 0
    assert (tmp_path / "output" / "validation" / "validation-000001.png").is_file()
    before = {f"./{name}": t for name, t in load_file(tmp_path / "control" / SAFETENSORS_WEIGHTS_NAME).items()}
    assert_same(control_weights(tmp_path / "output"), before)


def test_the_kind_of_control_follows_from_the_flags():
    def kind(*flags):
        return read_config(ControlNetConfig, ["--dataset_name=toyworld", "--max_train_steps=1", *flags]).kind

    assert [kind(), kind("--use_boft"), kind("--use_lora")] == ["full", "light", "light"]
    assert [kind("--controlnet=light"), kind("--use_boft", "--controlnet=full")] == ["light", "full"]
    with pytest.raises(InputError, match="--controlnet=full"):
        kind("--use_boft", "--controlnet_model_name_or_path=x")


def test_the_toy_world_is_no_folder(tmp_path, monkeypatch):
    """Although there is one of that name where the trainer lies."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    config = read_config(ControlNetConfig, ["--dataset_name=toyworld", "--max_train_steps=1"])
    config.with_values(dataset_name=config.data.dataset_place).save(tmp_path / "config.yaml")
    assert read_config(ControlNetConfig, [f"--config={tmp_path / 'config.yaml'}"]).data.is_toyworld
    local = read_config(ControlNetConfig, ["--dataset_name=data", "--max_train_steps=1", "--output_dir=run"])
    assert Path(local.data.dataset_place).is_absolute()


def test_scores_of_a_run(finished, tmp_path, capsys):
    """Controlled pictures, pictures without control, real ones; what is there is not drawn again."""
    run = Path(shutil.copytree(finished / "output", tmp_path / "run"))
    assert evaluate.main(["controlnet", str(run), "--every=1"]) == 0
    folder = run / "evaluation"
    assert {p.name for p in folder.iterdir()} == {
        "controlled", "without_control", "scores.md", "scores.csv", "by_picture.md", "by_picture.csv", "scores.json",
        "grid.png",
    }  # fmt: skip
    assert "| real pictures | 1 | 1.000 |" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    assert evaluate.main(["controlnet", str(run), "--every=1"]) == 0
    assert all(p.stat().st_mtime_ns == time for p, time in before.items() if p.parent != folder)
    with pytest.raises(InputError, match="--overwrite"):
        evaluate.main(["controlnet", str(run), "--controlnet_conditioning_scale=0"])
    assert evaluate.main(["controlnet", str(run), "--controlnet_conditioning_scale=0", "--overwrite"]) == 0
    controlled = Image.open(folder / "controlled" / "000-0.png")
    assert controlled.tobytes() != Image.open(folder / "without_control" / "000-0.png").tobytes(), "BOFT remains"
    with pytest.raises(InputError, match="held out 1"):
        evaluate.main(["controlnet", str(run), "--images=2"])


def test_the_grid_of_controls_is_one_that_the_trainer_takes():
    path = Path(compare_controls.__file__).with_suffix(".yaml")
    grid = read_grid(path, compare_controls.ToyControls())
    assert len(grid.methods) == 6 and grid.report.seeds == (0, 1, 2)
