"""Bases that Stable Diffusion's trainers cannot train: said what they are, before anything is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from control_training import control_flags, control_folder, run_control
from safetensors.torch import load_file, save_file
from training import flags, run

from finetuning.errors import InputError
from finetuning.models.layout import foreign_unet
from finetuning.models.loading import load_stable_diffusion

PLAIN = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def with_channels(folder: Path, given: int) -> Path:
    """The base with a UNet of another number of input channels."""
    weights = load_file(folder / "unet" / WEIGHTS)
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.zeros(len(first), given, *first.shape[2:])
    save_file(weights, folder / "unet" / WEIGHTS)
    edit(folder / "unet" / "config.json", in_channels=given)
    return folder


@pytest.fixture
def base(toy_base, tmp_path) -> Path:
    return Path(shutil.copytree(toy_base, tmp_path / "base"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 9}, "9 channels and the VAE gives 4.*inpainting"),
        ({"in_channels": 8}, "InstructPix2Pix"),
        ({"in_channels": 5}, "depth2img"),
        ({"in_channels": 7}, "upscaler"),
        ({"in_channels": 16}, "16 channels"),
        ({"in_channels": 7, "num_class_embeds": 1000}, "class labels"),
        ({"class_embed_type": "projection"}, "unCLIP"),
        ({"addition_embed_type": "text_time"}, "XL"),
        ({"time_cond_proj_dim": 256}, "latent consistency"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ({"out_channels": 8}, "gives 8 channels"),
        ({"cross_attention_dim": 1024}, "width 1024, the text encoder gives 768"),
    ],
    ids=str,
)
def test_what_a_base_is_that_is_not_stable_diffusion(change, words):
    assert foreign_unet(PLAIN, 4, 768) is None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(foreign_unet({**PLAIN, **change}, 4, 768))


def test_an_inpainting_base_is_refused_by_both_trainers(base, photos, tmp_path, capsys):
    with_channels(base, 17)
    data, output = control_folder(tmp_path / "data", 4), tmp_path / "output"
    (output / "checkpoint-1").mkdir(parents=True)
    for train, arguments in (run, flags(base, photos, output)), (run_control, control_flags(base, data, output)):
        code = train(*arguments, "--overwrite_output_dir")
        error = capsys.readouterr().err
        assert code == 2 and f"--pretrained_model_name_or_path={base}" in error and "inpainting" in error, error
    assert [p.name for p in output.iterdir()] == ["checkpoint-1"], "nothing is removed"


SCHEDULERS = {
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler, is of another kind"),
    "flow sigmas": ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "another kind"),
    "an inverse": ("DDIMInverseScheduler", {}, "another kind"),
    "continuous noise": ("EDMEulerScheduler", {}, "another kind"),
    "no scheduler": ("UNet2DConditionModel", {}, "names UNet2DConditionModel as the scheduler"),
    "an unknown one": ("MyScheduler", {}, "names MyScheduler"),
    "PNDM with PRK steps": ("PNDMScheduler", {"skip_prk_steps": False}, "--num_inference_steps=2.*PNDMScheduler"),
    "steps that LCM does not have": ("LCMScheduler", {"original_inference_steps": 1}, "--num_inference_steps=2"),
    "inpainting's own": ("RePaintScheduler", {}, "RePaintScheduler.*cannot draw"),
}


@pytest.mark.parametrize(("name", "settings", "words"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_that_cannot_be_used(name, settings, words, base, photos, tmp_path, capsys):
    edit(base / "model_index.json", scheduler=["diffusers", name])
    edit(base / "scheduler" / "scheduler_config.json", _class_name=name, **settings)
    assert run(*flags(base, photos, tmp_path / "output")) == 2
    error = capsys.readouterr().err
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error)
    assert "Traceback" not in error and not (tmp_path / "output").exists()


@pytest.mark.parametrize("entry", [[None, None], None])
def test_a_part_that_is_null_is_missing(entry, base):
    edit(base / "model_index.json", scheduler=entry)
    with pytest.raises(InputError, match="has no scheduler; give a complete"):
        load_stable_diffusion(str(base))


def rename(base: Path, parts: tuple[str, ...], variant: str) -> None:
    for part in parts:
        for path in (base / part).glob("*.safetensors"):
            path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_of_a_variant_only_are_named(variant, base):
    rename(base, ("unet", "vae", "text_encoder"), variant)
    with pytest.raises(InputError, match=f"weights are there as {variant} only; add --variant={variant}"):
        load_stable_diffusion(str(base))
    loaded = load_stable_diffusion(str(base), variant=variant)
    assert loaded.unet.dtype == torch.float32


def test_a_variant_that_is_not_there_is_named(base):
    with pytest.raises(InputError, match="has no weights of --variant=fp16, but plain ones; drop the flag"):
        load_stable_diffusion(str(base), variant="fp16")
    rename(base, ("unet",), "fp16")
    with pytest.raises(InputError, match="add --variant=fp16"):
        load_stable_diffusion(str(base))
