"""The trainer and what reads its results, on tiny random bases of every family: one contract for all of them."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))
sys.path.insert(0, str(Path(__file__).parent / "models"))

import numpy as np
import pytest
import torch
from conftest import draw_photo
from diffusers import DiffusionPipeline
from peft import PeftModel
from tiny_pipelines import BUILDERS
from training import BOFT, assert_same, flags, prior_flags, run, run_in_two, weights

from finetuning.adapters.pipelines import (
    get_strengths,
    load_adapter,
    load_base,
    merge_adapter,
    mix_adapters,
    set_strength,
    unload_adapter,
)
from finetuning.models.registry import load_family

pytestmark = pytest.mark.slow
FAMILIES = list(BUILDERS)
FLOW = [name for name in FAMILIES if not name.startswith(("sd15", "sdxl"))]
WITH_ENCODERS = [name for name in FAMILIES if name not in ("flux2", "z-image", "qwen-image")]  # that are trained
METHODS = {"boft": BOFT, "lora": ("--use_lora", "--rank=2"), "full": ()}
PROMPT = "a photo of qwe mug in the snow"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a family's tiny pipeline, made at first use."""
    return cache(lambda name: BUILDERS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Photos that are not square, one of them with a caption."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        draw_photo(i, (80 + 10 * i, 70)).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a photo of qwe mug on red beach")
    return folder


@pytest.fixture(scope="module")
def trained(base, photos, tmp_path_factory):
    """The output folder of a run of a family, trained by a method, text encoders too where that is possible."""

    @cache
    def train(name: str, method: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{method}")
        more = ["--train_text_encoder"] if name in WITH_ENCODERS else []
        more += prior_flags(folder / "class", 2)
        more += [f"--validation_prompt={PROMPT}", "--checkpointing_steps=2", "--validation_steps=4", "--resolution=64"]
        rate = "--learning_rate=1e-3" if method == "full" else "--learning_rate=1e-2"
        assert run(*flags(base(name), photos, folder / "output", *more, rate, adapter=METHODS[method])) == 0
        return folder / "output"

    return train


def draw(pipeline: DiffusionPipeline, name: str) -> np.ndarray:
    """A picture by the stock pipeline, (H, W, 3) in [0, 1]."""
    guidance = {"guidance_scale": 3.0}
    if name == "qwen-image":
        guidance = {"true_cfg_scale": 3.0, "negative_prompt": ""}
    generator = torch.Generator().manual_seed(0)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "generator": generator, "output_type": "np"}
    return pipeline(prompt=PROMPT, **options, **guidance).images[0]


def stock(folder: Path, name: str) -> DiffusionPipeline:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trained_parts(base: Path, name: str) -> list[str]:
    family = load_family(str(base))
    return [family.denoiser_part, *(family.encoder_parts if name in WITH_ENCODERS else ())]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_writes_what_it_says(name, method, base, trained):
    output = trained(name, method)
    parts = trained_parts(base(name), name)
    assert {key.split("/")[0] for key in weights(output)} >= set(parts)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert any("held_out_prior_loss" in line for line in lines)
    card = (output / "README.md").read_text()
    assert type(stock(base(name), name)).__name__ in card and (output / "comparison.png").exists()
    assert all(f"pipeline.{part}" in card for part in parts) or method == "full"
    assert len(list((output / "validation").iterdir())) >= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_training_changes_the_picture_and_its_method_is_followed_by_name(name, base, trained):
    before = draw(stock(base(name), name), name)
    for method in METHODS:
        pipeline = load_base(str(trained(name, method) if method == "full" else base(name)))
        if method != "full":
            load_adapter(pipeline, trained(name, method))
        assert abs(draw(pipeline, name) - before).max() > 1e-3, method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_resumed_is_uninterrupted_to_the_bit(name, method, base, photos, trained, tmp_path):
    whole = trained(name, method)
    output = tmp_path / "output"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    for file in ("config.yaml", "metrics.jsonl", "environment.json"):
        shutil.copy(whole / file, output / file)
    more = ["--train_text_encoder"] if name in WITH_ENCODERS else []
    more += [*prior_flags(whole.parent / "class", 2), "--checkpointing_steps=2", "--resolution=64"]
    rate = "--learning_rate=1e-3" if method == "full" else "--learning_rate=1e-2"
    arguments = flags(
        base(name), photos, output, *more, rate, "--resume_from_checkpoint=latest", adapter=METHODS[method]
    )
    assert run(*arguments) == 0
    assert_same(weights(whole / "checkpoint-4"), weights(output / "checkpoint-4"))


@pytest.mark.parametrize("method", ["boft", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_pipeline_draws_the_same_picture(name, method, base, trained):
    output = trained(name, method)
    ours = load_base(str(base(name)))
    load_adapter(ours, output)
    theirs = stock(base(name), name)
    for part in trained_parts(base(name), name):
        setattr(theirs, part, PeftModel.from_pretrained(getattr(theirs, part), output / part).get_base_model())
    np.testing.assert_allclose(draw(ours, name), draw(theirs, name), atol=2e-4)


@pytest.mark.parametrize("method", ["boft", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_mixed_merged_and_unloaded(name, method, base, trained):
    pipeline = load_base(str(base(name)))
    before = draw(pipeline, name)
    first = load_adapter(pipeline, trained(name, method))
    second = load_adapter(pipeline, trained(name, method) / "checkpoint-2", strength=0.0)
    alone = draw(pipeline, name)
    mix_adapters(pipeline, {first: 0.5, second: 0.5}, "mixture")
    assert abs(draw(pipeline, name) - alone).max() > 1e-5
    set_strength(pipeline, {"mixture": 0.0, first: 1.0})
    np.testing.assert_array_equal(draw(pipeline, name), alone)
    set_strength(pipeline, 0.0)
    np.testing.assert_array_equal(draw(pipeline, name), before)
    unload_adapter(pipeline)
    assert get_strengths(pipeline) == {}
    np.testing.assert_array_equal(draw(pipeline, name), before)
    load_adapter(pipeline, trained(name, method))
    merge_adapter(pipeline)
    assert get_strengths(pipeline) == {}
    np.testing.assert_array_equal(draw(pipeline, name), alone)
    assert abs(alone - before).max() > 1e-3


EVERYTHING = [
    "--prior_target=frozen_model", "--with_prior_preservation", "--class_prompt=a photo of a mug", "--use_ema",
    "--gradient_checkpointing", "--gradient_accumulation_steps=2", "--mixed_precision=bf16", "--boft_dropout=0.2",
    "--boft_target_modules=all", "--random_flip", "--resolution=48",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_that_the_trainer_has_works_together(name, base, photos, tmp_path):
    own = ["--timestep_sampling=logit-normal", "--logit_mean=0.5", "--loss_weighting=cosmap"]
    more = own if name in FLOW else ["--snr_gamma=5", "--offset_noise=0.1"]
    if name == "flux":
        more.append("--embedded_guidance=3.5")
    if name == "sdxl-v":
        more.append("--rescale_betas_zero_snr")
    if name in WITH_ENCODERS:
        more.append("--train_text_encoder")
    assert run(*flags(base(name), photos, tmp_path / "output", *EVERYTHING, *more)) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_flags_that_mean_nothing_for_a_family_are_refused(name, base, photos, tmp_path, capsys):
    wrong = {"--enable_xformers_memory_efficient_attention": "--enable_xformers"}
    if name in FLOW:
        wrong |= {"--snr_gamma=5": "--snr_gamma=5", "--offset_noise=0.1": "--offset_noise"}
        wrong |= {"--rescale_betas_zero_snr": "--rescale_betas_zero_snr"}
        if not name.startswith("sd3"):  # whose times are logit-normal
            wrong["--logit_std=2"] = "--logit_std"
    else:
        wrong |= {"--timestep_sampling=uniform": "--timestep_sampling=uniform", "--loss_weighting=cosmap": "flow"}
    if name != "flux":
        wrong["--embedded_guidance=3.5"] = "--embedded_guidance=3.5"
    if name not in WITH_ENCODERS:
        wrong["--train_text_encoder"] = "--train_text_encoder"
    wrong["--prediction_type=v_prediction"] = "--prediction_type"
    for flag, said in wrong.items():
        assert run(*flags(base(name), photos, tmp_path / "output", flag)) == 2, flag
        assert said in capsys.readouterr().err, flag
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sd15"])
def test_control_is_trained_on_stable_diffusion_alone(name, base, tmp_path, capsys):
    import train_controlnet
    from finetuning.settings.reading import run_command

    arguments = ["--dataset_name=toyworld", "--conditioning=edges", "--max_train_steps=1"]
    arguments += [f"--pretrained_model_name_or_path={base(name)}", f"--output_dir={tmp_path / 'output'}"]
    assert run_command(train_controlnet.main, arguments) == 2
    assert "control is trained on Stable Diffusion 1.x and 2.x" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["boft", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scripts_draw_merge_and_export(name, method, base, trained, tmp_path):
    """What generate, merge and export write; the exported files in the stock pipeline draw as the adapter does."""
    from scripts import export, generate, merge

    run_folder = f"--adapter={trained(name, method)}"
    generate.main(
        [run_folder, f"--prompt={PROMPT}", "--num_inference_steps=2", "--resolution=64", f"--output_dir={tmp_path}"]
    )
    assert (tmp_path / "grid.png").exists()
    ours = load_base(str(base(name)))
    load_adapter(ours, trained(name, method))
    wanted = draw(ours, name)

    merge.main([run_folder, f"--output_dir={tmp_path / 'merged'}"])
    np.testing.assert_allclose(draw(stock(tmp_path / "merged", name), name), wanted, atol=1e-4)

    export.main([run_folder, "--format=peft", f"--output={tmp_path / 'peft'}"])
    theirs = stock(base(name), name)
    for part in trained_parts(base(name), name):
        module = PeftModel.from_pretrained(getattr(theirs, part), tmp_path / "peft" / part).get_base_model()
        setattr(theirs, part, module)
    np.testing.assert_allclose(draw(theirs, name), wanted, atol=1e-3)

    file = tmp_path / "lora.safetensors"
    export.main([run_folder, "--format=lora", f"--output={file}", "--rank=1000"])
    theirs = stock(base(name), name)
    theirs.load_lora_weights(str(file))
    np.testing.assert_allclose(draw(theirs, name), wanted, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("sdxl-v", "sd3-without-t5")])
def test_two_processes_train_as_one(name, base, photos, tmp_path):
    """Also where the last layers of a text encoder or of a stream of tokens have no part in the loss."""
    more = ["--boft_target_modules=all", "--max_train_steps=2", "--learning_rate=1e-4"]
    more += ["--train_text_encoder"] if name in WITH_ENCODERS else []
    assert run(*flags(base(name), photos, tmp_path / "one", *more)) == 0
    assert run_in_two(*flags(base(name), photos, tmp_path / "two", *more, "--train_batch_size=1")) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=3e-4) for key in one)
    losses = [
        json.loads((tmp_path / place / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for place in ("one", "two")
    ]
    assert abs(losses[0] - losses[1]) < 1e-4
