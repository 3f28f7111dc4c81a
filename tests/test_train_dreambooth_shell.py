"""./train_dreambooth.sh on a data set of the shape of google/dreambooth, and what it reads from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import draw_photo

ROOT = Path(__file__).resolve().parent.parent
NAMES = """
backpack backpack_dog bear_plushie berry_bowl can candle cat cat2 clock colorful_sneaker dog dog2 dog3 dog5 dog6
dog7 dog8 duck_toy fancy_boot grey_sloth_plushie monster_toy pink_sunglasses poop_emoji rc_car red_cartoon robot_toy
shiny_sneaker teapot vase wolf_plushie""".split()  # noqa: SIM905
CLASSES = {"cat": "cat", "cat2": "cat", "dog": "dog", "teapot": "toy"}
PROMPTS = """
Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} on the beach'.format(unique_token, class_token),
]

Live Subject Prompts

prompt_list = [
'a red {0} {1}'.format(unique_token, class_token),
]
"""


@pytest.fixture(scope="module")
def dreambooth(tmp_path_factory) -> Path:
    """30 folders with 158 photos in all."""
    folder = tmp_path_factory.mktemp("dreambooth")
    for i, name in enumerate(NAMES):
        (folder / name).mkdir()
        for j in range(6 if i < 8 else 5):
            draw_photo(j).save(folder / name / f"{j:02}.jpg")
    lines = [f"{name},{CLASSES.get(name, 'toy')}" for name in NAMES]
    (folder / "prompts_and_classes.txt").write_text("Classes\n\nsubject_name,class\n" + "\n".join(lines) + PROMPTS)
    return folder


def shell(*command: object, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)


def prepare(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return shell(sys.executable, "scripts/prepare_dataset.py", *arguments, **environment)


def test_prompts_follow_the_kind_of_subject(dreambooth):
    teapot = prepare("dreambooth", 27, DREAMBOOTH_DIR=str(dreambooth)).stdout.splitlines()
    assert "name\tteapot" in teapot
    assert "instance_prompt\ta photo of qwe toy" in teapot
    assert "validation_prompt\ta qwe toy in the snow" in teapot and "base_prompt\ta toy in the snow" in teapot
    classes = [line.split("\t")[1] for line in teapot if line.startswith("class_prompt")]
    assert classes == ["a photo of a toy", "a toy in the snow", "a photo of a toy", "a toy on the beach"]
    cat = prepare("dreambooth", 6, "--token=sks", DREAMBOOTH_DIR=str(dreambooth)).stdout.splitlines()
    assert "validation_prompt\ta red sks cat" in cat and "base_prompt\ta red cat" in cat


def test_what_is_missing_is_said(dreambooth, tmp_path):
    beyond = prepare("dreambooth", 30, DREAMBOOTH_DIR=str(dreambooth))
    assert beyond.returncode == 2 and "0 to 29" in beyond.stderr
    (tmp_path / "prompts_and_classes.txt").write_text("")
    incomplete = prepare("dreambooth", 3, DREAMBOOTH_DIR=str(tmp_path))
    assert incomplete.returncode == 2 and "'photos': 0" in incomplete.stderr and "Traceback" not in incomplete.stderr


def test_the_script_trains_on_the_subject_of_an_index(dreambooth, sd15_base, tmp_path):
    done = shell(
        "./train_dreambooth.sh", 27, "--boft_block_size=4", "--boft_block_num=0", "--max_train_steps=1",
        "--num_inference_steps=1", "--num_dataloader_workers=0",
        DREAMBOOTH_DIR=str(dreambooth), MODEL_NAME=str(sd15_base), OUTPUT_DIR=str(tmp_path / "output"),
        CLASS_DIR=str(tmp_path / "class"), RESOLUTION="64", NUM_CLASS_IMAGES="2", REPORT_TO="none",
        VALIDATION_PROMPT="a qwe toy. In the snow",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "output" / "config.yaml").read_text())
    assert config["validation_prompt"] == ["a qwe toy. In the snow"] and config["base_prompt"] == []
    assert config["instance_data_dir"] == str(dreambooth / "teapot") and config["boft_n_butterfly_factor"] == 2
    assert (tmp_path / "output" / "comparison.png").is_file()
    assert (tmp_path / "output" / "unet" / "adapter_model.safetensors").is_file()


def test_bad_flags_end_the_script_with_exit_code_2(dreambooth, sd15_base, tmp_path):
    done = shell(
        "./train_dreambooth.sh", 27, "--nonsense",
        DREAMBOOTH_DIR=str(dreambooth), MODEL_NAME=str(sd15_base), OUTPUT_DIR=str(tmp_path / "output"),
    )  # fmt: skip
    assert done.returncode == 2 and "unknown flag --nonsense" in done.stderr
    assert not (tmp_path / "output").exists()
