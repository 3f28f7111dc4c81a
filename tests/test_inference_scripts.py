"""Scripts that use what was trained: what they draw and say, and that wrong input is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_inference import MAKERS, write_run

from finetuning.adapters.adapter import ADAPTER_WEIGHTS
from finetuning.pictures.generation import SCHEDULERS, read_parameters
from finetuning.settings import inference as settings
from finetuning.settings.reading import run_command
from scripts import export, generate, merge, time_generation


@pytest.fixture(scope="module")
def run(toy_base, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("export") / "mug", toy_base, MAKERS["boft with biases"])


def script(module, *arguments: object) -> int:
    return run_command(module.main, [str(argument) for argument in arguments])


def test_generate_draws_a_strip_with_parameters(run, toy_base, tmp_path, capsys):
    size = 16
    flags = ("--prompt", "a red mug", "a photo of qwe mug", "--seed", 3, 4, "--num_inference_steps", 2, "--base")
    out = tmp_path / "out"
    assert script(generate, "--adapter", run, *flags, "--strength", "0,0.5,1", "--output_dir", out) == 0
    assert "16 pictures in" in capsys.readouterr().out
    names = sorted(path.name for path in out.glob("*.png"))
    assert len(names) == 17 and "a-red-mug-seed3-strength-0.5.png" in names and "grid.png" in names

    def picture(name):
        return Image.open(out / name).tobytes()

    assert picture("a-red-mug-seed3-base-model.png") == picture("a-red-mug-seed3-strength-0.png")
    assert len({picture(f"a-red-mug-seed3-strength-{s}.png") for s in ("0", "0.5", "1")}) == 3
    assert read_parameters(out / "a-red-mug-seed4-strength-0.5.png") == {
        "prompt": "a red mug",
        "negative_prompt": "",
        "seed": 4,
        "steps": 2,
        "guidance_scale": 7.5,
        "size": size,
        "control": None,
        "control_scale": 1.0,
        "scheduler": "DDIMScheduler",
        "base": str(toy_base),
        "adapters": {str(run): 0.5},
        "mixed": False,
    }
    with Image.open(out / "a-red-mug-seed4-strength-0.5.png") as image:
        assert image.text["parameters"].startswith(
            "a red mug\nNegative prompt: \nSteps: 2, Sampler: DDIMScheduler, CFG"
        )

    single = tmp_path / "single"  # one at a time, the merged way
    assert script(
        generate, "--adapter", f"{run}:0.5", "--prompt", "a red mug", "--seed", 4, "--num_inference_steps", 2,
        "--batch_size", 1, "--output_dir", single,
    ) == 0  # fmt: skip
    left = Image.open(single / "a-red-mug-seed4-strength-1.png").tobytes()
    right = picture("a-red-mug-seed4-strength-0.5.png")
    assert max(abs(a - b) for a, b in zip(left, right)) <= 1


def test_generate_mixes_and_takes_files_and_schedulers(run, toy_base, tmp_path):
    other = write_run(tmp_path / "robot", toy_base, MAKERS["boft with biases"], seed=4)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red mug\n\na red cat\n")
    out = tmp_path / "out"
    assert tuple(SCHEDULERS) == settings.SCHEDULERS
    for scheduler in SCHEDULERS:
        assert script(
            generate, "--adapter", f"{run}:0.5", f"{other}:0.5", "--mix", "--each", "--prompt", prompts,
            "--scheduler", scheduler, "--num_inference_steps", 2, "--output_dir", out / scheduler,
            "--grid", out / "grid.webp",
        ) == 0  # fmt: skip
    with Image.open(out / "grid.webp") as picture:
        assert picture.format == "WEBP" and not list(out.glob("*/grid.png"))
    record = read_parameters(out / "euler" / "a-red-cat-seed0-mug-alone.png")
    assert not record["mixed"] and record["adapters"] == {str(run): 1.0}
    record = read_parameters(out / "euler" / "a-red-cat-seed0-mixture.png")
    assert record["mixed"] and record["adapters"] == {str(run): 0.5, str(other): 0.5}
    assert record["scheduler"] == "EulerDiscreteScheduler"
    assert script(generate, "--pretrained_model_name_or_path", toy_base, "--prompt", "a cat", "--seed", 1, 2,
                  "--num_inference_steps", 2, "--output_dir", out / "base") == 0  # fmt: skip
    assert sorted(p.name for p in (out / "base").iterdir()) == ["a-cat-seed1.png", "a-cat-seed2.png", "grid.png"]


def test_export_writes_each_format_and_says_what_it_loses(run, tmp_path, capsys):
    assert (
        script(export, "--format", "lora", "--adapter", run, "--output", tmp_path / "a.safetensors", "--rank", 2) == 0
    )
    out = capsys.readouterr().out
    assert "energy kept" in out and "trained biases" in out and "pipeline.load_lora_weights" in out
    assert script(export, "--format", "single-file", "--adapter", run, "--output", tmp_path / "b.safetensors") == 0
    assert "prediction type v_prediction" in capsys.readouterr().out
    assert script(export, "--format", "peft", "--adapter", f"{run}:0.5", "--output", tmp_path / "c") == 0
    assert json.loads((tmp_path / "c" / "unet" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1


def test_the_cost_of_an_adapter_is_printed(run, capsys):
    assert script(time_generation, "--adapter", run, "--rounds", 3, "--num_inference_steps", 1, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["base model", "adapters on it", "adapters merged"]
    assert "| 1.000 |" in lines[2] and "processor time of one picture, 1 steps, 16 pixels" in lines[5]


WRONG = {
    "no prompt": (generate, [], "--prompt: needed"),
    "no such run": (generate, ["--adapter", "absent", "--prompt", "x"], "absent: no such folder"),
    "strength": (generate, ["--adapter", "RUN", "--prompt", "x", "--strength", "0,much"], "strength 'much' must be"),
    "own strength": (generate, ["--adapter", "RUN:much", "--prompt", "x"], "strength 'much' must be a finite number"),
    "infinite": (generate, ["--adapter", "RUN:inf", "--prompt", "x"], "strength 'inf' must be a finite number"),
    "another base": (
        generate,
        ["--adapter", "RUN", "--prompt", "x", "--pretrained_model_name_or_path", "OTHER"],
        "was trained on BASE, the pipeline is OTHER",
    ),
    "no adapter": (generate, ["--adapter", "EMPTY", "--prompt", "x"], "holds no adapter (adapter_config.json in it"),
    "a whole pipeline for an adapter": (
        export,
        [
            "--format",
            "lora",
            "--output",
            "OUT/x.safetensors",
            "--adapter",
            "BASE",
            "--pretrained_model_name_or_path",
            "BASE",
        ],
        "is a whole pipeline, not an adapter",
    ),
    "a pickle file": (
        merge,
        ["--adapter", "EMPTY/mug.ckpt", "--output_dir", "OUT"],
        "a pickle file, which can run any",
    ),
    "a folder with a pickle": (
        generate,
        ["--adapter", "PICKLED", "--prompt", "x"],
        "has adapter_model.bin, a pickle file, which can run any code",
    ),
    "an unsupported model": (
        export,
        [
            "--format",
            "single-file",
            "--output",
            "OUT/x.safetensors",
            "--adapter",
            "RUN",
            "--pretrained_model_name_or_path",
            "LARGE",
        ],
        "1.x and 2.x",
    ),
    "both kinds": (
        generate,
        ["--adapter", "RUN", "LORA", "--prompt", "x"],
        "is LoRA, and the pipeline's unet carries",
    ),
    "scheduler": (generate, ["--prompt", "x", "--scheduler", "eular"], "did you mean euler?"),
    "size": (generate, ["--adapter", "RUN", "--prompt", "x", "--resolution", "25"], "must be a multiple of 4"),
    "device": (
        generate,
        ["--adapter", "RUN", "--prompt", "x", "--device", "tpu"],
        "--device=tpu: not on this machine",
    ),
    "nothing to mix": (generate, ["--prompt", "x", "--mix"], "--mix: needs --adapter"),
    "grid": (generate, ["--prompt", "x", "--grid", "x.gif"], "--grid=x.gif: must end in .png or .webp"),
    "flag": (generate, ["--prompts=x"], "did you mean prompt?"),
    "merge nothing": (merge, ["--output_dir", "OUT"], "--adapter: needed"),
    "merge into a full folder": (merge, ["--adapter", "RUN", "--output_dir", "RUN"], "is not empty"),
    "format": (export, ["--format", "onnx", "--output", "x", "--adapter", "RUN"], "must be one of single-file, lora"),
    "ending": (export, ["--format", "lora", "--output", "x.bin", "--adapter", "RUN"], "must end in .safetensors"),
    "rank": (
        export,
        ["--format", "lora", "--output", "OUT/x.safetensors", "--adapter", "RUN", "--rank", "0"],
        "--rank=0: must be auto or a whole number",
    ),
    "rank of what": (export, ["--format", "peft", "--output", "x", "--adapter", "RUN", "--rank", "4"], "belongs to"),
    "several for peft": (
        export,
        ["--format", "peft", "--output", "OUT/x", "--adapter", "RUN", "RUN"],
        "holds one adapter",
    ),
}


@pytest.fixture(scope="module")
def wrong_places(run, toy_base, tmp_path_factory) -> dict[str, Path]:
    """What is no adapter of this base, or no base."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "EMPTY").mkdir()
    (folder / "EMPTY" / "mug.ckpt").write_bytes(b"")
    shutil.copytree(run, folder / "PICKLED")
    (folder / "PICKLED" / "unet" / ADAPTER_WEIGHTS).rename(folder / "PICKLED" / "unet" / "adapter_model.bin")
    shutil.copytree(toy_base, folder / "LARGE")  # as SDXL has it
    index = json.loads((toy_base / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    (folder / "LARGE" / "model_index.json").write_text(json.dumps(index))
    write_run(folder / "LORA", toy_base, MAKERS["lora"])
    return {name: folder / name for name in ("EMPTY", "PICKLED", "LARGE", "LORA")}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    case, run, wrong_places, toy_base, sd15_base, tmp_path, capsys, monkeypatch
):
    module, flags, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run, "BASE": toy_base, "OTHER": sd15_base, "OUT": tmp_path / "out", **wrong_places}
    for name, place in places.items():
        flags = [flag.replace(name, str(place)) for flag in flags]
        message = message.replace(name, str(place))
    assert script(module, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "data").exists()
