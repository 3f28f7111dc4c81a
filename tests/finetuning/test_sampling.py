"""Pictures: seeded one by one, whatever the batch; modes restored; grids."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from conftest import draw_photo
from PIL import Image

from finetuning.control.network import new_hint_encoder
from finetuning.control.sampler import ControlSampler
from finetuning.dataset.stream import Batch
from finetuning.errors import InputError
from finetuning.files import save_picture
from finetuning.models.loading import load_stable_diffusion
from finetuning.models.schedulers import check_steps
from finetuning.modes import evaluating
from finetuning.pictures.grid import grid
from finetuning.pictures.sampler import Sampler
from finetuning.training.encoding import Encoding


@pytest.fixture(scope="module")
def base(toy_base):
    base = load_stable_diffusion(str(toy_base))
    base.freeze(torch.float32, torch.device("cpu"))
    return base


def arrays(images: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image in images]


def test_a_picture_depends_on_its_own_prompt_and_key_alone(base):
    prompts, keys = ["a red mug", "a dog", "a mug in the snow"], ["a", "b", "c"]
    sampler = Sampler(base, resolution=16, steps=2, guidance_scale=3, batch_size=3)
    together = arrays(sampler(prompts, 0, keys))
    sampler.batch_size = 2
    for a, b in zip(together, arrays(sampler(prompts, 0, keys))):
        assert abs(a - b).max() <= 1
    assert abs(together[2] - arrays(sampler(prompts[2:], 0, keys[2:]))[0]).max() <= 1
    assert abs(together[0] - arrays(sampler(prompts[:1], 1, keys[:1]))[0]).max() > 1, "another seed, another picture"


def test_a_picture_is_the_one_of_the_pipeline(base):
    """The same noise through diffusers' own pipeline, decoder and all."""
    from finetuning.randomness import normal

    ours = Sampler(base, resolution=16, steps=3, guidance_scale=3, batch_size=1)(["a red mug"], 0, ["k"])
    noise = normal(base.latent_shape(16), 0, "sample", ["k"])
    theirs = base.pipeline()("a red mug", latents=noise, num_inference_steps=3, guidance_scale=3).images
    assert abs(arrays(ours)[0] - arrays(theirs)[0]).max() <= 1


def test_modes_are_restored(base):
    base.unet.train()
    base.unet.mid_block.eval()
    with evaluating(base.unet):
        assert not any(module.training for module in base.unet.modules())
    assert base.unet.training and not base.unet.mid_block.training
    Sampler(base, 16, 1, 1.0, 1)(["a mug"], 0, ["k"])
    assert base.unet.training and not base.unet.mid_block.training


def test_latents_decode_to_what_was_encoded_by_the_library(base):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = base.moments(pixels).unbind(1)
    expected = base.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, expected.mean * base.vae.config.scaling_factor)
    torch.testing.assert_close(std, expected.std * base.vae.config.scaling_factor)
    torch.testing.assert_close(base.decode(mean), base.vae.decode(expected.mean).sample)


def test_embedded_prompts_are_the_encoded_ones(base):
    encoding = Encoding(base, seed=0)
    batch = Batch([], ["a mug", "a red dog", "a mug"], ["0", "1", "2"])
    expected = encoding.condition(batch)["text"]
    encoding.keep(batch.prompts)
    assert len(encoding.kept) == 2
    torch.testing.assert_close(encoding.condition(batch)["text"], expected)
    ids = base.tokenizer("a red dog", padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(expected[1], base.text_encoder(ids).last_hidden_state[0])


def test_a_grid_keeps_every_image_in_its_place(tmp_path):
    rows = [[draw_photo(3 * row + column, (64, 64)) for column in range(3)] for row in range(2)]
    picture = grid(rows, columns=["a", "b c", "d " * 40], captions=["first\nmore", "second"], photos=rows[0])
    save_picture(picture, tmp_path / "deep" / "grid.png")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["grid.png"]
    shown = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    for row in rows:
        for image in row:
            middle = np.asarray(image)[32, 32]
            assert (shown == middle).all(-1).sum() > 70 * 70, "half of each side, 96 pixels, less blurred edges"


def test_a_grid_of_large_images_does_not_grow_them():
    picture = grid([[draw_photo(0, (300, 300))]])
    assert 300 <= picture.width < 400


STOCHASTIC = {
    "EulerAncestralDiscreteScheduler": {},
    "DDPMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "SASolverScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}


@pytest.mark.parametrize("name", [*STOCHASTIC, "controlled"])
def test_the_noise_of_samplers_depends_on_seed_and_key_alone(name, base):
    """Whatever the batch, and whatever else has drawn from torch's own generator."""
    is_controlled = name == "controlled"
    kind = getattr(diffusers, "EulerAncestralDiscreteScheduler" if is_controlled else name)
    ours = replace(base, scheduler=kind.from_config({**base.scheduler.config, **STOCHASTIC.get(name, {})}))
    sampler, conditions = Sampler(ours, resolution=16, steps=4, guidance_scale=3, batch_size=3), None
    if is_controlled:
        sampler, conditions = (
            ControlSampler.made_of(sampler, new_hint_encoder(base.unet, 2, 3)),
            torch.rand(3, 3, 16, 16),
        )
    prompts, keys = ["a red mug", "a dog", "a mug in the snow"], ["a", "b", "c"]
    torch.manual_seed(0)
    together = arrays(sampler(prompts, 0, keys, conditions))
    sampler.batch_size = 1

    def alone(i: int, seed: int) -> np.ndarray:
        part = slice(i, i + 1)
        return arrays(sampler(prompts[part], seed, keys[part], None if conditions is None else conditions[part]))[0]

    for i in (2, 0, 1):
        assert abs(together[i] - alone(i, 0)).max() <= 1
    assert abs(together[0] - alone(0, 1)).max() > 1, "another seed, another picture"


def test_a_sampler_whose_noise_cannot_be_seeded_is_refused(base):
    class OwnNoise(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            noise = torch.randn_like(sample)
            return (super().step(model_output, timestep, sample, return_dict=False)[0] + noise,)

    state = torch.get_rng_state()
    with pytest.raises(InputError, match="draws noise that does not follow from --seed"):
        check_steps(OwnNoise.from_config(base.scheduler.config), 3)
    for kind in (diffusers.DDIMScheduler, diffusers.EulerAncestralDiscreteScheduler):
        check_steps(kind.from_config(base.scheduler.config), 3)
    assert torch.equal(torch.get_rng_state(), state)
