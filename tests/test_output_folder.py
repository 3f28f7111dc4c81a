"""What stands where a run would write: other runs' results, inputs, and what no run has made."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import yaml
from conftest import draw_photo
from control_training import control_flags, control_folder, run_control
from training import flags, prior_flags, run

from finetuning.errors import InputError
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.folders import is_same, lies_inside
from finetuning.settings.reading import read_config
from finetuning.training.checkpoint import Checkpoints
from finetuning.training.complete_folder import SaveError, write_folder

STEP = ("--max_train_steps=1",)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(code: int, capsys) -> str:
    error = capsys.readouterr().err
    assert code == 2 and "error: " in error and "Traceback" not in error, error
    return error


@pytest.fixture(scope="module")
def result(toy_base, tmp_path_factory) -> Path:
    """A folder with photos and a run of one step, which left no checkpoint."""
    folder = tmp_path_factory.mktemp("result")
    (folder / "photos").mkdir()
    for i in range(2):
        draw_photo(i).save(folder / "photos" / f"{i}.png")
    assert run(*flags(toy_base, folder / "photos", folder / "output", *STEP)) == 0
    assert not list((folder / "output").glob("checkpoint-*"))
    return folder


@pytest.fixture
def output(result, tmp_path) -> Path:
    return Path(shutil.copytree(result / "output", tmp_path / "output"))


# A result that stands


@pytest.mark.parametrize("more", [["--seed=5"], ["--resume_from_checkpoint=latest", "--max_train_steps=4"]], ids=str)
def test_a_result_is_not_replaced(more, result, output, toy_base, capsys):
    before = content(output)
    error = refused(run(*flags(toy_base, result / "photos", output, *STEP, *more)), capsys)
    assert str(output) in error and "unet" in error and "--overwrite_output_dir" in error
    assert content(output) == before


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "README.md", "model_index.json", "config.json", "adapter_config.json"]
)
def test_anything_that_a_run_writes_is_a_result(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}.*--overwrite_output_dir"):
        Checkpoints(tmp_path).choose(None)
    assert Checkpoints(tmp_path).choose(None, overwrite=True) is None and (tmp_path / name).exists()


def test_a_run_that_had_only_begun_is_begun_again_by_latest(tmp_path):
    """As a killed one leaves it, before its first checkpoint."""
    for name in ("config.yaml", "metrics.jsonl", "environment.json"):
        (tmp_path / name).touch()
    assert Checkpoints(tmp_path).choose("latest") is None
    write_folder(tmp_path / "unet", lambda folder: (folder / "weights").touch())  # killed before its last page
    assert Checkpoints(tmp_path).choose("latest") is None
    (tmp_path / "README.md").touch()
    with pytest.raises(InputError, match="no checkpoint but a result"):
        Checkpoints(tmp_path).choose("latest")


def test_a_checkpoint_of_elsewhere_does_not_go_on_over_a_result(result, output, toy_base, tmp_path, capsys):
    arguments = flags(toy_base, result / "photos", tmp_path / "other", "--checkpointing_steps=1")
    assert run(*arguments, "--max_train_steps=1") == 0
    arguments = flags(toy_base, result / "photos", output, "--max_train_steps=2")
    arguments.append(f"--resume_from_checkpoint={tmp_path / 'other' / 'checkpoint-1'}")
    before = content(output)
    assert "holds what another run has left" in refused(run(*arguments), capsys)
    assert content(output) == before
    assert run(*arguments, "--overwrite_output_dir") == 0


def test_an_adapter_over_a_full_fine_tune_leaves_no_mixture(result, toy_base, tmp_path):
    output = tmp_path / "output"
    assert run(*flags(toy_base, result / "photos", output, *STEP, adapter=())) == 0
    assert (output / "model_index.json").exists() and (output / "vae").exists()
    (output / "mine.safetensors").touch()
    assert run(*flags(toy_base, result / "photos", output, *STEP, "--overwrite_output_dir")) == 0
    assert {p.name for p in output.iterdir()} == {
        "unet", "metrics.jsonl", "config.yaml", "environment.json", "README.md", "mine.safetensors",
    }  # fmt: skip
    assert (output / "unet" / "adapter_config.json").exists()


LEFT = (  # by a run, and by the tools that look at it
    "report.html", "scores.json", "scores-step-2.json", "validation/validation-000001.png",
    "validation/consistency.png", "logs/events.out.tfevents.1.host",
    "wandb/offline-run-1/run.wandb", "wandb/debug.log", "evaluation/scores.json",
    "evaluation/grid.png", "evaluation/prompts.csv", "evaluation/prompts.md", "evaluation/pictures/000-0.png",
    "evaluation/pictures/record.json", "evaluation/controlled/000-0.png", "evaluation/without_control/000-0.png",
)  # fmt: skip


def test_overwriting_leaves_nothing_of_the_former_run(result, output, toy_base):
    for name in LEFT:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    fresh = {path.name for path in (result / "output").iterdir()}
    assert run(*flags(toy_base, result / "photos", output, *STEP, "--overwrite_output_dir")) == 0
    assert {path.name for path in output.iterdir()} == fresh


def test_a_run_that_replaces_another_keeps_the_logs_that_it_opens_itself(result, toy_base, tmp_path):
    output = tmp_path / "output"
    arguments = flags(toy_base, result / "photos", output, *STEP, "--overwrite_output_dir")
    arguments = [argument for argument in arguments if not argument.startswith("--report_to")]
    assert run(*arguments, "--report_to=tensorboard") == 0
    (first,) = (output / "logs").iterdir()
    assert run(*arguments, "--report_to=tensorboard", "--seed=1") == 0
    (second,) = (output / "logs").iterdir()
    assert second.name != first.name and second.stat().st_size > 0


def test_the_logs_of_the_former_run_lie_where_its_configuration_says(output):
    for name in ("boards/events.out.tfevents.1.host", "boards/mine.txt", "logs/events.out.tfevents.2.host"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    config = output / "config.yaml"
    config.write_text(config.read_text().replace("logging_dir: logs", "logging_dir: boards"))
    checkpoints = Checkpoints(output)
    checkpoints.choose(None, overwrite=True)
    checkpoints.begin(is_new=True)
    assert set(content(output)) == {"boards/mine.txt"}


def test_what_no_run_has_made_stays_beside_what_is_removed(output, tmp_path):
    mine = (
        "validation/mine.png",
        "evaluation/notes.txt",
        "evaluation/pictures/mine.png",
        "logs/mine.log",
        "mine.json",
    )
    for name in (*LEFT, *mine):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    shutil.rmtree(output / "wandb")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "run-1").touch()
    (output / "wandb").symlink_to(tmp_path / "elsewhere")
    checkpoints = Checkpoints(output)
    checkpoints.choose(None, overwrite=True)
    checkpoints.begin(is_new=True)
    assert set(content(output)) == set(mine)
    assert (tmp_path / "elsewhere" / "run-1").exists() and (output / "wandb").is_symlink()


@pytest.mark.parametrize("place", ["..", "../beside", "absolute"])
def test_logs_outside_the_folder_are_not_touched(place, output, tmp_path):
    outside = tmp_path / "beside"
    outside.mkdir()
    for folder in (outside, tmp_path):
        (folder / "events.out.tfevents.1.host").touch()
    config = output / "config.yaml"
    place = str(outside) if place == "absolute" else place
    config.write_text(config.read_text().replace("logging_dir: logs", f"logging_dir: {place}"))
    checkpoints = Checkpoints(output)
    checkpoints.choose(None, overwrite=True)
    checkpoints.begin(is_new=True)
    assert (outside / "events.out.tfevents.1.host").exists() and (tmp_path / "events.out.tfevents.1.host").exists()


@pytest.mark.parametrize("where", ["unet/mine.txt", "vae/model.bin", "checkpoint-9/optimizer.bin"])
def test_what_no_run_has_put_there_is_never_removed(where, result, output, toy_base, capsys):
    (output / where).parent.mkdir(exist_ok=True)
    (output / where).touch()
    before = content(output)
    arguments = flags(toy_base, result / "photos", output, *STEP, "--overwrite_output_dir")
    assert f"holds {where.removesuffix('/optimizer.bin')}, which" in refused(run(*arguments), capsys)
    assert content(output) == before
    (output / where).unlink()
    if not any((output / where).parent.iterdir()):
        (output / where).parent.rmdir()
    assert run(*arguments) == 0


def test_a_link_in_the_place_of_a_part_is_not_followed(tmp_path):
    """Nor removed, even if it leads to what a run has made, or nowhere."""
    write_folder(tmp_path / "elsewhere", lambda folder: (folder / "weights").touch())
    (tmp_path / "output").mkdir()
    for target in ("elsewhere", "nowhere"):
        (tmp_path / "output" / "unet").symlink_to(tmp_path / target)
        with pytest.raises(InputError, match="holds unet, which no run has put there"):
            Checkpoints(tmp_path / "output").choose(None, overwrite=True)
        (tmp_path / "output" / "unet").unlink()
    assert (tmp_path / "elsewhere" / "weights").exists()


def test_a_folder_that_appears_while_training_is_not_removed_either(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "mine").touch()
    with pytest.raises(SaveError, match="mine stands there"):
        write_folder(tmp_path / "unet", lambda folder: (folder / "new").touch())
    assert [p.name for p in (tmp_path / "unet").iterdir()] == ["mine"]


def test_nothing_is_removed_before_all_input_is_known_to_be_right(result, toy_base, tmp_path, capsys):
    output, classes = tmp_path / "output", tmp_path / "class"
    arguments = flags(toy_base, result / "photos", output, *prior_flags(classes), *STEP, "--checkpointing_steps=1")
    assert run(*arguments) == 0
    (classes / "class-00001.png").write_bytes(b"")
    before = content(tmp_path)
    assert "class-00001.png" in refused(run(*arguments, "--overwrite_output_dir"), capsys)
    assert content(tmp_path) == before


# Inputs


def test_paths_lead_to_one_place(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    a, b, link = str(tmp_path / "a"), str(tmp_path / "a" / "b"), str(tmp_path / "link")
    assert is_same(a, link) and is_same(a, f"{b}/..") and is_same(f"{link}/new", f"{a}/new") and not is_same(a, b)
    assert lies_inside(f"{link}/new/deep", a) and lies_inside(b, link) and not lies_inside(a, a)
    assert not lies_inside(f"{a}-other", a)


INPUTS = (
    "pretrained_model_name_or_path",
    "tokenizer_name",
    "instance_data_dir",
    "held_out_data_dir",
    "class_data_dir",
)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("output", ["input", "link", "input/deep/out", "input/../input/", "."])
def test_no_output_among_inputs(name, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name != "class_data_dir":  # which the trainer makes
        (tmp_path / "input").mkdir()
    (tmp_path / "link").symlink_to("input")
    given = {"instance_data_dir": "photos", name: "input", "instance_prompt": "qwe", "output_dir": output}
    more = ["--with_prior_preservation", "--class_prompt=mug", "--class_data_dir=class"]
    with pytest.raises(InputError) as caught:
        read_config(DreamBoothConfig, [*more, *(f"--{key}={value}" for key, value in given.items())])
    assert f"--output_dir={output}" in str(caught.value) and f"--{name}" in str(caught.value)


def test_the_base_stands_after_a_run_that_was_to_replace_it(toy_base, photos, tmp_path, capsys):
    base = Path(shutil.copytree(toy_base, tmp_path / "base"))
    before = content(base)
    arguments = flags(base, photos, base, *STEP, "--overwrite_output_dir")
    assert "is --pretrained_model_name_or_path too" in refused(run(*arguments), capsys)
    assert content(base) == before


@pytest.mark.parametrize("name", ["train_data_dir", "conditioning_data_dir", "controlnet_model_name_or_path"])
def test_no_control_output_among_inputs(name, toy_base, tmp_path, capsys):
    data = control_folder(tmp_path / "data", 4)
    (tmp_path / "input").mkdir()
    place = data if name == "train_data_dir" else tmp_path / "input"
    for output in (place, place / "deep", tmp_path):
        before = content(tmp_path)
        arguments = control_flags(toy_base, data, output, "--controlnet=full", f"--{name}={place}")
        error = refused(run_control(*arguments), capsys)
        assert f"--output_dir={output}: " in error and f"--{name}" in error
        assert content(tmp_path) == before


def test_folders_that_must_differ(toy_base, photos, tmp_path, capsys):
    data = control_folder(tmp_path / "data", 4)
    for name in ("conditioning_data_dir", "held_out_data_dir"):
        arguments = control_flags(toy_base, data, tmp_path / "output", f"--{name}={data}/.")
        assert f"--{name}={data}/.: is --train_data_dir too" in refused(run_control(*arguments), capsys)
    arguments = flags(toy_base, photos, tmp_path / "output")
    error = refused(run(*arguments, f"--held_out_data_dir={photos}"), capsys)
    assert f"--held_out_data_dir={photos}: is --instance_data_dir too" in error
    (tmp_path / "more").mkdir()
    both = [f"--held_out_data_dir={tmp_path}/more", *prior_flags(tmp_path / "more")]
    assert "--class_data_dir" in refused(run(*arguments, *both), capsys)
    within = prior_flags(toy_base / "images")
    assert "lies inside --pretrained_model_name_or_path" in refused(run(*arguments, *within), capsys)


# Paths as they are typed


def test_the_home_folder_is_known_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("held_out_data_dir: ~/held\nvalidation_prompt: [~/p.txt, ~ a mug]\n")
    given = ["--config=~/run.yaml", "--instance_data_dir=~/photos", "--instance_prompt=qwe", "--output_dir=~/out"]
    config = read_config(DreamBoothConfig, [*given, "--class_prompt", "~/c.txt", "b", "--with_prior_preservation",
                                            "--class_data_dir=~/class"])  # fmt: skip
    assert (
        config.subject.instance_data_dir == f"{tmp_path}/photos" and config.prior.class_data_dir == f"{tmp_path}/class"
    )
    assert config.subject.held_out_data_dir == f"{tmp_path}/held"
    assert config.checkpoints.output_dir == f"{tmp_path}/out"
    assert config.prior.class_prompt == [f"{tmp_path}/c.txt", "b"]
    assert config.validation.validation_prompt == [f"{tmp_path}/p.txt", "~ a mug"]
    with pytest.raises(InputError, match="--output_dir=~nobody-of-this-name/x: there is no such home folder"):
        read_config(DreamBoothConfig, [*given, "--output_dir=~nobody-of-this-name/x"])


def test_controls_to_draw_by_are_found_from_other_folders(toy_base, tmp_path, monkeypatch):
    data = control_folder(tmp_path / "data", 4)
    monkeypatch.chdir(data)
    more = ["--validation_image", "controls/0.png", "controls/1.png", "--validation_prompt=a mug", *STEP]
    assert run_control(*control_flags(toy_base, data, tmp_path / "output", *more)) == 0
    saved = yaml.safe_load((tmp_path / "output" / "config.yaml").read_text())
    assert saved["validation_image"] == [str(data / "controls" / f"{i}.png") for i in (0, 1)]
