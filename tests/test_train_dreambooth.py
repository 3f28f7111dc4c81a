"""The real command line on small models with random weights: what a run writes, and what it is equal to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
import yaml
from conftest import draw_photo
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from test_checkpoint import largest_file
from training import BOFT, assert_same, flags, metrics, optimizer_of, prior_flags, run, run_in_two, weights

from finetuning.dreambooth.class_images import batches_of
from finetuning.run.run import Run
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.reading import read_config
from finetuning.training.complete_folder import damage
from train_dreambooth import DreamBooth

LORA = ("--use_lora", "--rank=2")
FULL = ()


def close(left: dict, right: dict, tolerance: float = 1e-4) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


# What a run writes


@pytest.fixture(scope="module")
def finished(toy_base, tmp_path_factory) -> Path:
    """A run with prior preservation, validation and checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "photos").mkdir()
    for i in range(3):
        draw_photo(i).save(folder / "photos" / f"{i}.png")
    code = run(
        *flags(toy_base, folder / "photos", folder / "output", *prior_flags(folder / "class", 5)),
        "--validation_prompt", "a photo of qwe mug in the snow", "a photo of qwe mug. red",
        "--base_prompt", "a photo of a mug in the snow", "a photo of a mug. red",
        "--validation_steps=2", "--num_validation_images=2", "--checkpointing_steps=2", "--report_to=tensorboard",
    )  # fmt: skip
    assert code == 0
    return folder


def test_the_output_folder(finished):
    output = finished / "output"
    assert {p.name for p in output.iterdir()} == {
        "unet", "checkpoint-2", "checkpoint-4", "validation", "logs", "metrics.jsonl", "config.yaml", "README.md",
        "comparison.png", "environment.json",
    }  # fmt: skip
    environment = json.loads((output / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["threads"] == "1"
    assert environment["weights"] == json.loads((finished / "class" / "record.json").read_text())["weights"]
    assert damage(output / "unet") is None and damage(output / "checkpoint-4") is None
    assert {p.name for p in (output / "validation").iterdir()} == {"validation-000002.png", "validation-000004.png"}
    assert_same(weights(output), weights(output / "checkpoint-4"))
    card = (output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "a photo of qwe mug" in card
    assert any((output / "logs").iterdir())


def test_the_log(finished):
    lines = metrics(finished / "output")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert line["loss"] == pytest.approx(line["instance_loss"] + line["prior_loss"], abs=1e-4)
        assert line["gradient_norm"] > 0 and line["images_per_second"] > 0 and line["peak_memory_gib"] > 0
    assert training[-1]["rotation_degrees"] > 0
    held_out = [line for line in lines if "held_out_instance_loss" in line]
    assert [line["step"] for line in held_out] == [2, 4]


def test_the_comparison_shows_three_rows_under_the_photos(finished):
    picture = Image.open(finished / "output" / "comparison.png")
    assert picture.height > picture.width, "two columns, three rows, and the photos"


def test_the_adapter_loads_in_peft_and_changes_pictures(finished, toy_base):
    pipeline = StableDiffusionPipeline.from_pretrained(toy_base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        return pipeline("a photo of qwe mug", num_inference_steps=2, output_type="pt",
                        generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    before = draw()
    PeftModel.from_pretrained(pipeline.unet, finished / "output" / "unet")
    assert (draw() - before).abs().max() > 1e-3


def test_class_images_are_counted_recorded_and_used_again(finished, toy_base):
    folder = finished / "class"
    images = sorted(folder.glob("class-*.png"))
    assert len(images) == 5
    record = json.loads((folder / "record.json").read_text())
    assert record["prompts"] == ["a photo of a mug", "a red mug"]
    assert record["resolution"] == 16 and record["seed"] == 0 and record["steps"] == 2
    before = {p: p.stat().st_mtime_ns for p in images}
    arguments = flags(toy_base, finished / "photos", finished / "again", "--max_train_steps=1")
    assert run(*arguments, *prior_flags(folder, 6)) == 0
    after = {p: p.stat().st_mtime_ns for p in folder.glob("class-*.png")}
    assert before.items() < after.items() and len(after) == 6, "one more, the others untouched"


def test_class_images_do_not_depend_on_the_batch_size(finished, toy_base, tmp_path):
    arguments = flags(toy_base, finished / "photos", tmp_path / "output", "--max_train_steps=1")
    assert run(*arguments, *prior_flags(tmp_path / "class", 5), "--sample_batch_size=2") == 0
    for path in sorted((tmp_path / "class").glob("class-*.png")):
        a, b = (torch.tensor(list(Image.open(p).tobytes())) for p in (path, finished / "class" / path.name))
        assert (a - b).abs().max() <= 1


def test_missing_class_images_are_drawn_in_the_batches_of_an_empty_folder():
    """Whose rounding they would otherwise not have; processes share whole batches."""
    assert batches_of(range(7), 7, 3) == [0, 1, 2, 3, 4, 5, 6]
    assert batches_of([1, 6], 7, 3) == [0, 1, 2, 6]
    assert [batches_of(range(7), 7, 3, rank, 2) for rank in (0, 1)] == [[0, 1, 2, 6], [3, 4, 5]]
    assert batches_of([], 7, 3) == []


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_class_images_are_the_same_bits_whatever_was_missing(scheduler, toy_base, photos, tmp_path):
    base, classes = Path(shutil.copytree(toy_base, tmp_path / "base")), tmp_path / "class"
    for file in (base / "model_index.json", base / "scheduler" / "scheduler_config.json"):
        file.write_text(file.read_text().replace("DDIMScheduler", scheduler))
    arguments = [*flags(base, photos, tmp_path / "output", *prior_flags(classes, 7)), "--overwrite_output_dir"]
    more = ["--max_train_steps=1", "--sample_batch_size=3"]
    assert run(*arguments, *more) == 0
    before = {path.name: path.read_bytes() for path in classes.glob("*.png")}
    for i in (1, 2, 3, 6):
        (classes / f"class-0000{i}.png").unlink()
    assert run(*arguments, *more) == 0
    assert {path.name: path.read_bytes() for path in classes.glob("*.png")} == before
    shutil.rmtree(classes)
    assert run_in_two(*arguments, *more) == 0
    assert {path.name: path.read_bytes() for path in classes.glob("*.png")} == before


@pytest.mark.parametrize(
    ("more", "field"),
    [(["--seed=1"], "seed was 0, is now 1"), (["--guidance_scale=3"], "guidance_scale was 7.5, is now 3.0")],
)
def test_class_images_made_otherwise_are_refused(more, field, finished, toy_base, tmp_path, capsys):
    arguments = flags(toy_base, finished / "photos", tmp_path / "output", *prior_flags(finished / "class", 5))
    assert run(*arguments, *more) == 2
    error = capsys.readouterr().err
    assert field in error and "to regenerate" in error
    assert not (tmp_path / "output").exists()


def test_own_class_images_are_respected(toy_base, photos, tmp_path):
    own = tmp_path / "class"
    own.mkdir()
    for i in range(2):
        draw_photo(10 + i).save(own / f"mine {i}.jpg")
    arguments = flags(toy_base, photos, tmp_path / "output", "--max_train_steps=1", "--with_prior_preservation")
    assert run(*arguments, f"--class_data_dir={own}", "--class_prompt=a mug", "--num_class_images=2") == 0
    assert sorted(p.name for p in own.iterdir()) == ["mine 0.jpg", "mine 1.jpg"]


# What a run is equal to


def test_the_configuration_file_repeats_the_run(finished, tmp_path):
    config = finished / "output" / "config.yaml"
    assert run(f"--config={config}", f"--output_dir={tmp_path / 'again'}", "--report_to=none") == 0
    assert_same(weights(finished / "output"), weights(tmp_path / "again"))


def test_looking_and_saving_do_not_change_the_run(finished, toy_base, tmp_path):
    arguments = flags(toy_base, finished / "photos", tmp_path / "output", *prior_flags(finished / "class", 5))
    assert run(*arguments) == 0
    assert_same(weights(finished / "output"), weights(tmp_path / "output"))


def test_the_seed_decides(finished, toy_base, tmp_path):
    arguments = flags(toy_base, finished / "photos", tmp_path / "output", *prior_flags(tmp_path / "class", 5))
    assert run(*arguments, "--seed=1") == 0
    other = weights(finished / "output")
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights(tmp_path / "output").items())


@pytest.mark.parametrize("adapter", [("--use_boft", "--boft_block_size=4"), LORA], ids=["boft", "lora"])
def test_accumulation_equals_the_large_batch(adapter, toy_base, photos, tmp_path):
    arguments = [*prior_flags(tmp_path / "class"), "--learning_rate=1e-3", "--snr_gamma=5", "--offset_noise=0.1"]
    large, small = tmp_path / "large", tmp_path / "small"
    assert run(*flags(toy_base, photos, large, *arguments, "--train_batch_size=4", adapter=adapter)) == 0
    accumulated = ["--train_batch_size=1", "--gradient_accumulation_steps=4"]
    assert run(*flags(toy_base, photos, small, *arguments, *accumulated, adapter=adapter)) == 0
    close(weights(large), weights(small))
    for a, b in zip(metrics(large), metrics(small)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


NO_CACHE = ["--no_cache_latents", "--dataloader_num_workers=1"]


@pytest.mark.parametrize(
    "more", [NO_CACHE, ["--no_pre_compute_text_embeddings"], ["--gradient_checkpointing"]], ids=str
)
def test_caches_and_checkpointing_change_nothing(more, finished, toy_base, tmp_path):
    arguments = flags(toy_base, finished / "photos", tmp_path / "output", *prior_flags(finished / "class", 5), *more)
    assert run(*arguments) == 0
    close(weights(finished / "output"), weights(tmp_path / "output"), 1e-3)


def test_the_schedule_reaches_its_end_under_accumulation(toy_base, photos, tmp_path):
    more = ["--gradient_accumulation_steps=2", "--lr_scheduler=linear", "--train_batch_size=1"]
    assert run(*flags(toy_base, photos, tmp_path / "output", *more)) == 0
    rates = [line["learning_rate"] for line in metrics(tmp_path / "output") if "loss" in line]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_each_rate_is_logged_under_its_own_name(toy_base, photos, tmp_path):
    more = ["--boft_scale_learning_rate=1e-3", "--max_train_steps=1"]
    assert run(*flags(toy_base, photos, tmp_path / "output", *more)) == 0
    (line,) = metrics(tmp_path / "output")
    assert {name: line[name] for name in line if "learning_rate" in name} == {
        "learning_rate": 1e-2, "learning_rate_scale": 1e-3,
    }  # fmt: skip


def test_training_binds_the_photos(toy_base, photos, tmp_path):
    more = ["--max_train_steps=40", "--validation_steps=1", "--learning_rate=2e-2"]
    assert run(*flags(toy_base, photos, tmp_path / "output", *more, adapter=FULL)) == 0
    losses = [line["held_out_instance_loss"] for line in metrics(tmp_path / "output") if "loss" not in line]
    assert losses[-1] < 0.8 * losses[0]


# Variants


def test_averages_are_what_is_kept_in_the_end(toy_base, photos, tmp_path):
    output = tmp_path / "output"
    assert run(*flags(toy_base, photos, output, "--use_ema", "--max_train_steps=3", "--checkpointing_steps=1")) == 0
    average, *later = (weights(output / f"checkpoint-{step}") for step in (1, 2, 3))
    for t, now in enumerate(later, 1):
        decay = (1 + t) / (10 + t)
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    close(weights(output), average, 1e-6)
    assert max((average[name] - now[name]).abs().max() for name in now) > 1e-3


def test_the_frozen_model_as_the_prior_target(toy_base, photos, tmp_path):
    """Before the first update student and teacher agree, so the prior loss begins at 0."""
    more = ["--with_prior_preservation", "--prior_target=frozen_model", "--class_prompt", "a mug", "a red mug"]
    for name, adapter in {"boft": ("--use_boft", "--boft_block_size=4"), "full": FULL}.items():
        output = tmp_path / name
        assert run(*flags(toy_base, photos, output, *more, "--train_text_encoder", adapter=adapter)) == 0
        losses = [line["prior_loss"] for line in metrics(output)]
        assert losses[0] < 1e-9 and losses[-1] > 1e-6
        assert not list(tmp_path.glob("class*"))


def test_zero_terminal_snr(toy_base, photos, tmp_path):
    more = ["--rescale_betas_zero_snr", "--snr_gamma=5", "--validation_prompt=a red mug", "--validation_steps=4"]
    assert run(*flags(toy_base, photos, tmp_path / "output", *more)) == 0
    assert all(line.get("loss", 0) < 100 for line in metrics(tmp_path / "output"))


def test_a_full_fine_tune_of_the_sd15_layout_saves_a_pipeline(sd15_base, photos, tmp_path):
    """As diffusers' own example tests ask it of their script."""
    output = tmp_path / "output"
    arguments = flags(
        sd15_base, photos, output, "--checkpointing_steps=2", "--checkpoints_total_limit=2", adapter=FULL
    )
    assert run(*arguments, "--max_train_steps=4", "--train_batch_size=1", "--learning_rate=5e-4") == 0
    assert (output / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (output / "scheduler" / "scheduler_config.json").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(output, safety_checker=None)
    pipeline("a red mug", num_inference_steps=1)
    assert {p.name for p in output.iterdir() if "checkpoint" in p.name} == {"checkpoint-2", "checkpoint-4"}
    UNet2DConditionModel.from_pretrained(output / "checkpoint-2", subfolder="unet")

    shutil.rmtree(output / "checkpoint-2")
    shutil.rmtree(output / "unet")
    assert run(*arguments, "--max_train_steps=8", "--train_batch_size=1", "--learning_rate=5e-4",
               "--resume_from_checkpoint=checkpoint-4") == 0  # fmt: skip
    assert {p.name for p in output.iterdir() if "checkpoint" in p.name} == {"checkpoint-6", "checkpoint-8"}


def test_the_sd15_layout_with_boft_on_both_models(sd15_base, photos, tmp_path):
    output = tmp_path / "output"
    more = ["--train_text_encoder", "--boft_target_modules=all", "--gradient_checkpointing", "--mixed_precision=bf16"]
    assert run(*flags(sd15_base, photos, output, *more, "--max_train_steps=2", "--checkpointing_steps=1")) == 0
    assert {name.split("/")[0] for name in weights(output)} == {"unet", "text_encoder"}
    assert {tensor.dtype for tensor in weights(output).values()} == {torch.float32}
    pipeline = StableDiffusionPipeline.from_pretrained(sd15_base, safety_checker=None)
    for part in ("unet", "text_encoder"):
        PeftModel.from_pretrained(getattr(pipeline, part), output / part)


def test_wandb_works_offline_and_no_secret_is_written(toy_base, photos, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    output = tmp_path / "output"
    more = ["--report_to=all", "--wandb_project_name=p", "--wandb_run_name=r", "--max_train_steps=1"]
    assert run(*flags(toy_base, photos, output), *more, "--validation_prompt=a mug", "--validation_steps=1") == 0
    assert list(output.glob("wandb/offline-run-*"))
    written = [p for p in output.rglob("*") if p.is_file()]
    assert not any(b"hf_secret_of_the_environment" in p.read_bytes() for p in written)


# Interruptions


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_resumes_to_the_same_bits(
    number, code, finished, toy_base, tmp_path, monkeypatch
):
    output = tmp_path / "output"
    arguments = flags(toy_base, finished / "photos", output, *prior_flags(finished / "class", 5))
    log, handler = Run.log, signal.getsignal(number)

    def log_and_signal(self, step, **values):
        log(self, step, **values)
        if step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_signal)
        assert run(*arguments) == code
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (output / "unet").exists()
    assert signal.getsignal(number) is handler, "handlers are restored"
    assert run(*arguments, "--resume_from_checkpoint=latest") == 0
    assert_same(weights(finished / "output"), weights(output))


def test_a_second_signal_stops_at_once(toy_base, photos, tmp_path, monkeypatch):
    def log_and_signal(self, step, **values):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Run, "log", log_and_signal)
        os._exit(run(*flags(toy_base, photos, tmp_path / "output")))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert not list((tmp_path / "output").glob("checkpoint-*"))


def test_a_full_disk_stops_with_one_line_and_loses_nothing(toy_base, photos, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = flags(toy_base, photos, output, "--checkpointing_steps=2")
    assert run(*arguments, "--max_train_steps=2") == 0
    before = optimizer_of(output / "checkpoint-2")
    capsys.readouterr()
    with largest_file(20_000):
        assert run(*arguments, "--resume_from_checkpoint=latest") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "are needed" in error[0] and "checkpoint-2 stands" in error[0]
    assert_same(before, optimizer_of(output / "checkpoint-2"))
    assert run(*arguments, "--resume_from_checkpoint=latest") == 0


def test_a_full_disk_at_the_end_is_one_line(toy_base, photos, tmp_path, capsys):
    with largest_file(20_000):
        assert run(*flags(toy_base, photos, tmp_path / "output", "--max_train_steps=1", adapter=FULL)) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "could not be written" in error[0] and "no earlier checkpoint" in error[0]
    assert not (tmp_path / "output" / "model_index.json").exists()


def test_the_size_of_a_checkpoint_is_known_before_it_is_written(toy_base, photos, tmp_path):
    for flags_of_kind, least in ((BOFT, 0.5), (FULL, 0.9)):  # what is small is half names and settings
        arguments = flags(toy_base, photos, tmp_path / "output", "--use_ema", adapter=flags_of_kind)
        trainer = DreamBooth(read_config(DreamBoothConfig, arguments))
        for _, parameter in trainer.adapters["unet"].named_trainables():
            parameter.grad = torch.zeros_like(parameter)
        trainer.training.optimizer.step()
        folder = tmp_path / trainer.config.adapter.kind
        trainer.training.state.write(folder, 1)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert least * written < trainer.training.state.size() < written


def test_resuming_with_another_number_of_threads_is_said(finished, toy_base, tmp_path, capsys):
    output = tmp_path / "output"
    shutil.copytree(finished / "output", output)
    arguments = flags(toy_base, finished / "photos", output, *prior_flags(finished / "class", 5))
    torch.set_num_threads(2)
    assert run(*arguments, "--resume_from_checkpoint=latest") == 0
    assert "the bits may differ: threads was 1, is 2" in capsys.readouterr().err


def test_resuming_another_run_lists_the_differences(finished, toy_base, tmp_path, capsys):
    output = tmp_path / "output"
    shutil.copytree(finished / "output", output)
    arguments = flags(toy_base, finished / "photos", output, *prior_flags(finished / "class", 5))
    more = ["--resume_from_checkpoint=checkpoint-2", "--learning_rate=1", "--snr_gamma=5", "--train_batch_size=1"]
    assert run(*arguments, *more) == 2
    error = capsys.readouterr().err
    assert "--learning_rate=1.0: the checkpoint was made with 0.01" in error
    assert "--snr_gamma=5.0: the checkpoint was made with None" in error
    assert "--train_batch_size × --gradient_accumulation_steps × processes = 1" in error


def test_the_learning_goes_on_with_more_steps_where_the_schedule_has_no_end(finished, toy_base, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(finished / "output", output)
    arguments = flags(toy_base, finished / "photos", output, *prior_flags(finished / "class", 5))
    assert run(*arguments, "--resume_from_checkpoint=latest", "--max_train_steps=5") == 0
    assert [line["step"] for line in metrics(output) if "loss" in line] == [1, 2, 3, 4, 5]
