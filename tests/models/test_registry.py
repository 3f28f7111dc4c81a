"""Which models the one door takes, and what it says of the others."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_pipelines import BUILDERS, build_flux

from finetuning.errors import InputError
from finetuning.models.flux import Flux
from finetuning.models.flux2 import Flux2Klein
from finetuning.models.qwen_image import QwenImage
from finetuning.models.registry import load_family
from finetuning.models.sd3 import StableDiffusion3
from finetuning.models.sdxl import StableDiffusionXL
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.models.z_image import ZImage

KINDS = {"sd15": StableDiffusion, "sdxl": StableDiffusionXL, "flux2": Flux2Klein, "z-image": ZImage}
KINDS |= {"qwen-image": QwenImage, "flux": Flux, "sd3": StableDiffusion3, "sd3-without-t5": StableDiffusion3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: BUILDERS[name](tmp_path_factory.mktemp(name)) for name in KINDS}


@pytest.fixture
def edited(folders, tmp_path):
    """A copy of a family's folder under another name, with changes in one of its JSON files."""

    def edit(name: str, called: str = "model", file: str = "model_index.json", **changes: object):
        copy = shutil.copytree(folders[name], tmp_path / called)
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
        return copy

    return edit


def refusal(folder, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_family(str(folder), **options)
    assert str(caught.value).startswith(f"--pretrained_model_name_or_path={folder}")
    return str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_each_folder_is_of_its_family(name, folders):
    base = load_family(str(folders[name]))
    assert type(base) is KINDS[name] and base.name == str(folders[name])
    assert load_family(str(folders[name])).fingerprint == base.fingerprint


@pytest.mark.parametrize("name", ["sdxl", "flux2", "z-image"])
def test_large_parts_are_loaded_in_the_asked_precision(name, folders):
    base = load_family(str(folders[name]), dtype=torch.bfloat16)
    assert base.part(base.denoiser_part).dtype == base.text_encoder.dtype == torch.bfloat16
    assert base.vae.dtype == torch.float32


@pytest.mark.parametrize(
    "name, called, instead",
    [
        ("sdxl", "sdxl-turbo", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sdxl", "SDXL-Lightning", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sdxl", "models--ByteDance--Hyper-SD/snapshots/0a1b", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("z-image", "Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
        ("sd15", "sd-turbo", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_models_whose_name_says_distilled(name, called, instead, edited):
    folder = edited(name, called)
    message = refusal(folder)
    assert f"train {instead} instead" in message and "--allow_distilled" in message
    assert type(load_family(str(folder), allow_distilled=True)) is KINDS[name]


def test_models_whose_configuration_says_distilled(edited):
    folder = edited("flux2", is_distilled=True)
    assert "train black-forest-labs/FLUX.2-klein-base-4B instead" in refusal(folder)
    base = load_family(str(folder), allow_distilled=True)
    assert base.pipeline().config.is_distilled


def test_flux_schnell_is_known_by_its_configuration(tmp_path):
    folder = build_flux(tmp_path / "model", guidance_embeds=False)
    assert "train black-forest-labs/FLUX.1-dev instead" in refusal(folder)
    base = load_family(str(folder), allow_distilled=True)
    x, condition = torch.zeros(1, *base.latent_shape(64)), base.condition(base.embed(["a mug"]))
    assert base.predict(base.transformer, x, torch.ones(1), condition).shape == x.shape


def test_words_within_names_are_no_distillation(edited):
    assert load_family(str(edited("sdxl", "wildcmd-hyperreal-schnellzug")))


@pytest.mark.parametrize(
    "kind, wanted",
    [
        ("StableDiffusionXLInpaintPipeline", "images from text"),
        ("StableDiffusionImg2ImgPipeline", "images from text"),
        ("FluxControlNetPipeline", "images from text"),
        ("Flux2Pipeline", "train black-forest-labs/FLUX.2-klein-base-4B instead"),
        ("WanPipeline", "Z-Image"),
    ],
)
def test_other_pipelines_are_refused(kind, wanted, edited):
    message = refusal(edited("sd15", _class_name=kind))
    assert f"is a {kind}" in message and wanted in message


@pytest.mark.parametrize("name, part", [("sdxl", "text_encoder_2"), ("flux2", "vae"), ("z-image", "tokenizer")])
def test_incomplete_folders_are_refused(name, part, edited):
    folder = edited(name)
    shutil.rmtree(folder / part)
    assert f"has no {part}" in refusal(folder)


def test_weights_that_are_not_there_are_not_drawn(edited):
    from safetensors.torch import load_file, save_file

    folder = edited("z-image")
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    lost = weights.popitem()[0]
    save_file(weights, path, metadata={"format": "pt"})
    assert "the weights of text_encoder lack" in (message := refusal(folder)) and lost in message


def test_other_schedulers_are_refused(edited):
    folder = edited("z-image", scheduler=["diffusers", "DDIMScheduler"])
    assert "flow matching" in refusal(folder)


def test_other_predictions_are_refused(edited):
    assert "prediction type sample" in refusal(
        edited("sdxl", file="scheduler/scheduler_config.json", prediction_type="sample")
    )


def test_what_can_be_no_model(tmp_path):
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "no model_index.json" in refusal(tmp_path)
