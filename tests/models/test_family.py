"""What every family must do, one contract over tiny random pipelines of all of them.

Above all: what it predicts is what the stock pipeline predicts, and a picture of the one is a picture of the other.
"""

from __future__ import annotations

import math
from copy import deepcopy
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import BUILDERS

from finetuning.adapters.adapter import add_boft, add_lora, train_fully
from finetuning.errors import InputError
from finetuning.models.frame import Frame
from finetuning.models.registry import load_family
from finetuning.objective.diffusion import mean_squared_error
from finetuning.objective.process import Diffusion
from finetuning.randomness import normal

PROMPTS = ["a photo of qwe mug", "qwe dog in the snow on red beach, a cat, a toy"]  # of different lengths
HEIGHT, WIDTH = 64, 96
FRAMES = [Frame((HEIGHT, WIDTH), (0, 0), (HEIGHT, WIDTH))] * 2
GUIDANCE = 3.0
FAMILIES = list(BUILDERS)
PACKED = ("flux", "qwen-image")  # whose pipelines take and return tokens of 2 × 2 latents


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folder of a family's tiny pipeline, made at first use."""
    return cache(lambda name: BUILDERS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def loaded(folder):
    """A family, loaded and frozen; for tests that do not change it."""

    @cache
    def load(name):
        base = load_family(str(folder(name)))
        base.freeze(torch.float32, torch.device("cpu"))
        return base

    return load


def noise_of(base, seed: int = 0) -> torch.Tensor:
    channels, h, w = base.latent_shape(HEIGHT)
    return normal((channels, h, w * WIDTH // HEIGHT), seed, "test", range(2))


def predict(base, x_t: torch.Tensor, t: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    condition = base.condition(base.embed(prompts), FRAMES[: len(prompts)])
    return base.predict(base.part(base.denoiser_part), x_t, t, condition)


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_of_a_batch_are_those_of_its_prompts(name, loaded):
    base = loaded(name)
    together = base.embed(PROMPTS)
    alone = [base.embed([prompt])[0] for prompt in PROMPTS]
    for one, other in zip(together, alone):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-5)
    x, t = noise_of(base), base.process.spread_times(2)
    both = predict(base, x, t, PROMPTS)
    for i, prompt in enumerate(PROMPTS):  # padding to the longer prompt changes nothing
        alone = predict(base, x[i : i + 1], t[i : i + 1], [prompt])
        torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=1e-4)


class Shared(torch.nn.Module):
    """A module as processes share it: wrapped, and called in its place."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_text_encoders_are_called_in_the_place_of_the_frozen_ones(name, loaded):
    base = loaded(name)
    frozen = base.embed(PROMPTS)
    for part in base.encoder_parts:
        trained = deepcopy(base.part(part)).requires_grad_(True)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.5)
        conditions = base.embed(PROMPTS, {part: Shared(trained)})
        changed = [key for key in frozen[0] if not torch.equal(conditions[0][key], frozen[0][key])]
        assert changed
        x, t = noise_of(base), base.process.spread_times(2)
        base.predict(base.part(base.denoiser_part), x, t, base.condition(conditions, FRAMES)).sum().backward()
        first = trained.get_input_embeddings().weight
        assert first.grad is not None and first.grad.abs().sum() > 0
        other = deepcopy(base)
        setattr(other, part, trained)
        for one, same in zip(conditions, other.embed(PROMPTS)):
            assert all(torch.equal(one[key], same[key]) for key in one)


def watched(pipeline: DiffusionPipeline) -> list[tuple]:
    """The arguments that the pipeline's scheduler is given in each step: prediction, time, x_t."""
    seen, kind = [], type(pipeline.scheduler)

    class Watched(kind):
        def step(self, model_output, timestep, sample, **options):
            scaled = self.scale_model_input(sample, timestep) if hasattr(self, "scale_model_input") else sample
            seen.append((model_output.clone(), timestep, scaled.clone()))
            return super().step(model_output, timestep, sample, **options)

    pipeline.scheduler = Watched.from_config(pipeline.scheduler.config)
    return seen


def stock(folder, name: str) -> DiffusionPipeline:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder(name), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, name: str, noise: torch.Tensor, steps: int, output_type: str):
    guidance = {"guidance_scale": GUIDANCE}
    if name == "qwen-image":
        guidance = {"true_cfg_scale": GUIDANCE, "negative_prompt": ["", ""]}
    return pipeline(
        prompt=list(PROMPTS),  # a copy, for some pipelines change it
        height=HEIGHT,
        width=WIDTH,
        latents=packed(noise) if name in PACKED else noise,
        num_inference_steps=steps,
        output_type=output_type,
        **guidance,
    ).images


def guided(name: str, with_prompt: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598); Z-Image counts its scale from 0, FLUX.1 is told it as an input."""
    if name == "flux":
        return with_prompt
    scale = GUIDANCE if name == "z-image" else GUIDANCE - 1
    both = with_prompt + scale * (with_prompt - without)
    if name == "qwen-image":  # which keeps the length of each token
        tokens = (
            packed(both) * packed(with_prompt).norm(dim=-1, keepdim=True) / packed(both).norm(dim=-1, keepdim=True)
        )
        return as_latents(tokens, both.shape, is_packed=True)
    return both


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_those_of_the_stock_pipeline(name, folder, loaded):
    base, pipeline = loaded(name), stock(folder, name)
    base.guidance = GUIDANCE  # which FLUX.1 alone reads
    seen = watched(pipeline)
    noise = noise_of(base)
    draw(pipeline, name, noise, 3, "latent")
    assert len(seen) >= 3
    for wanted, time, x_t in seen:
        x_t, wanted = (as_latents(tensor, noise.shape, is_packed=name in PACKED) for tensor in (x_t, wanted))
        t = time if isinstance(base.process, Diffusion) else time / 1000
        with torch.no_grad():
            predicted = guided(name, *(predict(base, x_t, t.expand(2), p) for p in (PROMPTS, ["", ""])))
        assert wanted.std() > 0.01
        torch.testing.assert_close(predicted, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) to (B, h * w / 4, C * 4): tokens of 2 × 2, channel by channel, row by row."""
    return torch.nn.functional.unfold(latents, 2, stride=2).transpose(1, 2)


def as_latents(tensor: torch.Tensor, shape: torch.Size, is_packed: bool) -> torch.Tensor:
    """Tokens, as some transformers have them, to (B, C, h, w)."""
    if is_packed:
        return torch.nn.functional.fold(tensor.transpose(1, 2), shape[2:], 2, stride=2)
    return tensor if tensor.ndim == 4 else tensor.transpose(1, 2).reshape(shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_those_of_the_stock_pipeline(name, folder, loaded):
    """`draw`, from noise to pixels, decodes as the stock pipeline does."""
    base = loaded(name)
    noise = noise_of(base)
    wanted = draw(stock(folder, name), name, noise, 2, "pt")
    drawn = base.draw(PROMPTS, noise, steps=2, guidance_scale=GUIDANCE)
    assert drawn.shape == (2, 3, HEIGHT, WIDTH)
    torch.testing.assert_close((drawn / 2 + 0.5).clamp(0, 1), wanted, atol=1e-4, rtol=1e-4)


def to_vae(name: str, pixels: torch.Tensor) -> torch.Tensor:
    return pixels[:, :, None] if name == "qwen-image" else pixels  # a video of one frame


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_of_an_image_are_decoded_to_what_the_vae_alone_makes_of_it(name, loaded):
    base = loaded(name)
    pixels = normal((3, HEIGHT, WIDTH), 1, "pixels", range(2)).clamp(-1, 1)
    moments = base.moments(pixels)
    assert moments.dtype == torch.float32 and moments.shape == (2, 2, *noise_of(base).shape[1:])
    with torch.no_grad():
        mode = base.vae.encode(to_vae(name, pixels)).latent_dist.mode()
        wanted = base.vae.decode(mode).sample.reshape(pixels.shape)
    torch.testing.assert_close(base.decode(moments[:, 0]), wanted, atol=1e-5, rtol=1e-4)
    channels, h, w = base.latent_shape(HEIGHT)
    assert moments.shape[2:] == (channels, h, w * WIDTH // HEIGHT)


@pytest.mark.parametrize("name", FAMILIES)
def test_deviations_of_latents_are_those_of_draws(name, loaded):
    """Mean and deviation are normalized alike: decoding mean ± deviation equals the VAE's own mean ± deviation."""
    base = loaded(name)
    pixels = normal((3, HEIGHT, WIDTH), 2, "pixels", range(1)).clamp(-1, 1)
    mean, deviation = base.moments(pixels).unbind(1)
    with torch.no_grad():
        distribution = base.vae.encode(to_vae(name, pixels)).latent_dist
        wanted = base.vae.decode(distribution.mean + distribution.std).sample.reshape(pixels.shape)
    torch.testing.assert_close(base.decode(mean + deviation), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_follow_from_noised_ones_and_the_target(name, loaded):
    process = loaded(name).process
    x0, noise = noise_of(loaded(name), 1), noise_of(loaded(name), 2)
    t = process.times(0, ["a", "b"])
    x_t, target = process.noised(x0, noise, t), process.target(x0, noise, t)
    if not isinstance(process, Diffusion):
        recovered = x_t - t[:, None, None, None] * target
    else:
        alpha = process.alpha_bar[t][:, None, None, None]
        if process.prediction == "epsilon":
            recovered = (x_t - (1 - alpha).sqrt() * target) / alpha.sqrt()
        else:
            recovered = alpha.sqrt() * x_t - (1 - alpha).sqrt() * target
    torch.testing.assert_close(recovered, x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_one_of_the_paper(name, loaded):
    """Written down from the papers' terms, beside what the trainers compute with the process."""
    base = loaded(name)
    process, keys = base.process, ["a", "b"]
    x0 = noise_of(base, 3)
    t, noise = process.times(0, keys), process.noise(x0, 0, keys)
    with torch.no_grad():
        predicted = predict(base, process.noised(x0, noise, t), t, PROMPTS)
        losses = process.weight(t) * mean_squared_error(predicted, process.target(x0, noise, t))
        for i, time in enumerate(t):
            if isinstance(process, Diffusion):
                alpha = math.prod(float(1 - beta) for beta in base.noise_schedule.betas[: int(time) + 1])
                x_t = math.sqrt(alpha) * x0[i] + math.sqrt(1 - alpha) * noise[i]
                is_v = process.prediction == "v_prediction"
                wanted = math.sqrt(alpha) * noise[i] - math.sqrt(1 - alpha) * x0[i] if is_v else noise[i]
            else:
                x_t, wanted = (1 - time) * x0[i] + time * noise[i], noise[i] - x0[i]
            own = predict(base, x_t[None], time[None], [PROMPTS[i]])
            torch.testing.assert_close(losses[i], ((own[0] - wanted) ** 2).mean(), atol=1e-5, rtol=1e-3)


METHODS = {
    "boft": lambda base, module, preset: add_boft(module, [preset], block_size=4, factors=2, presets=base.presets),
    "lora": lambda base, module, preset: add_lora(module, [preset], rank=2, presets=base.presets),
    "full": lambda base, module, preset: train_fully(module),
}


@pytest.mark.parametrize("method", ["boft", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_each_preset_names_layers(name, method, loaded):
    counts = []
    for preset in ("attention", "attention+feed-forward", "transformer", "all"):
        base = deepcopy(loaded(name))
        x, t = noise_of(base), base.process.spread_times(2)
        with torch.no_grad():
            before = predict(base, x, t, PROMPTS)
            adapter = METHODS[method](base, base.part(base.denoiser_part), preset)
            after = predict(base, x, t, PROMPTS)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
        counts.append(adapter.count())
    assert counts == sorted(set(counts))  # each preset has layers that the one before lacks


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", FAMILIES)
def test_ten_steps_on_one_image_lower_the_loss(name, method, loaded):
    base = deepcopy(loaded(name))
    denoiser = base.part(base.denoiser_part)
    adapter = METHODS[method](base, denoiser, "all")
    x0 = base.moments(normal((3, HEIGHT, WIDTH), 1, "pixels", range(2)).clamp(-1, 1))[:, 0]
    noise, t = noise_of(base, 5), base.process.spread_times(2)
    x_t, target = base.process.noised(x0, noise, t), base.process.target(x0, noise, t)
    condition = base.condition(base.embed(PROMPTS), FRAMES)
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_trainables()], lr=1e-3 if method == "full" else 1e-2)
    losses = []
    for _ in range(11):
        loss = mean_squared_error(base.predict(adapter.module, x_t, t, condition), target).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_predicts_nearly_the_same(name, folder, loaded):
    """A base in bfloat16 under autocast, fed with float32, as the trainers do it."""
    half = load_family(str(folder(name)))
    half.freeze(torch.bfloat16, torch.device("cpu"))
    assert half.vae.dtype == torch.float32
    base = loaded(name)
    x, t = noise_of(base), base.process.spread_times(2)
    with torch.no_grad():
        wanted = predict(base, x, t, PROMPTS)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = predict(half, x, t, PROMPTS).float()
    assert (predicted - wanted).abs().mean() < 0.1 * wanted.abs().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_the_encoders_would_cut_are_refused(name, loaded):
    base = loaded(name)
    base.check_prompts(PROMPTS, "--instance_prompt")
    with pytest.raises(InputError, match=r"--instance_prompt='qwe .*tokens, the model reads"):
        base.check_prompts(["qwe " * 600], "--instance_prompt")


@pytest.mark.parametrize("name", ["flux2", "z-image", "qwen-image"])
def test_a_prompt_of_as_many_tokens_as_the_model_reads_is_the_longest(name, loaded):
    base = loaded(name)
    longest = "a" * (base.max_tokens - len(base.tokenizer(base.chat("")).input_ids))
    base.check_prompts([longest], "--instance_prompt")
    with pytest.raises(InputError, match=f"{base.max_tokens + 1} tokens, the model reads {base.max_tokens};"):
        base.check_prompts([longest + "a"], "--instance_prompt")
    if name == "flux2":  # whose conditions are padded
        return
    full, cut = base.embed([longest, longest + "a"])
    assert len(full["text"]) == len(cut["text"]) > len(base.embed([longest[1:]])[0]["text"])


def test_fingerprints_follow_the_weights(folder, loaded):
    first = FAMILIES[0]
    assert load_family(str(folder(first))).fingerprint == loaded(first).fingerprint
    assert len({loaded(name).fingerprint for name in FAMILIES}) == len(FAMILIES)
