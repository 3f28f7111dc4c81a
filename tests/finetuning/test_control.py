"""Hint encoder, hint in the UNet, pipeline: a fresh control changes nothing, and a control is what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from control_training import edges_of
from PIL import Image

from finetuning.control.consistency import (
    EdgeDetector,
    MaskDetector,
    consistency,
    edge_scores,
    mean_iou,
    overlay,
    references,
)
from finetuning.control.network import HintEncoder, hinted, new_controlnet, new_hint_encoder, predict
from finetuning.control.pipeline import control_pipeline
from finetuning.models.loading import load_stable_diffusion


@pytest.fixture(scope="module")
def base(toy_base):
    base = load_stable_diffusion(str(toy_base))
    base.freeze(torch.float32, torch.device("cpu"))
    return base


@pytest.fixture(scope="module")
def trained(base) -> HintEncoder:
    """A hint encoder whose last convolution is no longer zero."""
    torch.manual_seed(1)
    encoder = new_hint_encoder(base.unet, base.vae_scale, 1)
    torch.nn.init.normal_(encoder.layers[-1].weight, std=0.5)
    return encoder.eval()


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_eight_convolutions_to_the_size_of_the_latents(scale, channels):
    encoder = HintEncoder(channels, 12, scale)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in encoder.modules()) == 8
    hint = encoder(torch.rand(2, channels, 32, 16))
    assert hint.shape == (2, 12, 32 // scale, 16 // scale) and not hint.any()


def test_a_factor_that_eight_convolutions_cannot_follow():
    for scale in (3, 16):
        with pytest.raises(ValueError, match="power of 2"):
            HintEncoder(3, 8, scale)


@pytest.mark.parametrize("make", [new_hint_encoder, new_controlnet])
def test_a_fresh_control_changes_nothing_and_learns(make, base):
    torch.manual_seed(0)
    control = make(base.unet, base.vae_scale, 3).requires_grad_(True)
    x_t, t, text = torch.randn(2, 8, 8, 8), torch.tensor([5, 900]), torch.randn(2, 24, 16)
    predicted = predict(base, base.unet, control, x_t, t, {"text": text}, torch.rand(2, 3, 16, 16))
    assert torch.equal(predicted, base.unet(x_t, t, text).sample)
    predicted.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in control.parameters())


def test_the_hint_comes_after_the_first_convolution(base):
    x_t, t, text, hint = (
        torch.randn(2, 8, 8, 8),
        torch.tensor([5, 9]),
        torch.randn(2, 24, 16),
        torch.randn(2, 16, 8, 8),
    )
    seen = []
    handle = base.unet.down_blocks[0].register_forward_pre_hook(lambda m, args, kw: seen.append(kw["hidden_states"]),
                                                                with_kwargs=True)  # fmt: skip
    with torch.no_grad(), hinted(base.unet, hint):
        base.unet(x_t, t, text)
        base.unet(torch.cat([x_t, x_t]), 5, torch.cat([text, text]))
    with torch.no_grad(), hinted(base.unet, hint, guess_mode=True):
        base.unet(torch.cat([x_t, x_t]), 5, torch.cat([text, text]))
    handle.remove()
    plain = base.unet.conv_in(x_t)
    for found, wanted in zip(seen, [plain + hint, torch.cat([plain + hint] * 2), torch.cat([plain, plain + hint])]):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not base.unet.conv_in._forward_hooks, "nothing stays behind"
    with pytest.raises(ValueError, match="3 samples"), hinted(base.unet, hint):
        base.unet(torch.randn(3, 8, 8, 8), 5, torch.randn(3, 24, 16))


def draw(pipeline, prompt="a red mug", seed=0, count=1, steps=2, **options):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    options = {"num_inference_steps": steps, "guidance_scale": 3, "output_type": "latent", **options}
    return pipeline(prompt, generator=generators, **options).images


def test_the_pipeline_honours_scale_guess_mode_and_several_images(base, trained):
    pipeline, plain = control_pipeline(base, trained), base.pipeline()
    edges, other = edges_of(), Image.eval(edges_of(), lambda v: 255 - v)
    calls = []
    handle = trained.register_forward_hook(lambda *_: calls.append(1))
    full = draw(pipeline, image=edges, steps=3)
    assert len(calls) == 1, "once an image, not once a step"
    handle.remove()

    without = draw(plain, height=16, width=16)
    assert torch.equal(draw(pipeline, image=edges, controlnet_conditioning_scale=0.0), without)
    found = [draw(pipeline, image=edges, controlnet_conditioning_scale=s) for s in (0.5, 1.0)]
    found.append(draw(pipeline, image=edges, guess_mode=True))
    for i, a in enumerate(found):
        for b in [without, *found[:i]]:
            assert (a - b).abs().max() > 1e-3
    assert full.shape == found[0].shape

    prompts, controls = ["a red mug", "a dog"], [edges, other]
    many = draw(pipeline, prompts, image=controls, num_images_per_prompt=2, count=4)
    for i in range(4):
        one = draw(pipeline, prompts[i // 2], seed=i, image=controls[i // 2])
        torch.testing.assert_close(many[i : i + 1], one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": None}, "needed"),
        ({"image": torch.rand(1, 2, 16, 16)}, "2 channels"),
        ({"image": Image.new("RGB", (16, 16))}, "3 channels"),
        ({"image": edges_of(), "height": 32, "width": 32}, "resize it"),
        ({"image": [edges_of()] * 3}, "3 controls for 1"),
        ({"image": edges_of(), "control_guidance_start": 0.5}, "control_guidance_start"),
    ],
)
def test_the_pipeline_refuses(options, words, base, trained):
    with pytest.raises(ValueError, match=words):
        draw(control_pipeline(base, trained), **options)


# Scores


def test_edge_scores():
    wanted = np.asarray(edges_of(64)) > 0
    assert edge_scores(wanted, wanted) == dict.fromkeys(["edge_f1", "edge_iou", "edge_precision", "edge_recall"], 1.0)
    near = edge_scores(np.roll(wanted, 1, axis=0), wanted)
    assert near["edge_f1"] == 1 and near["edge_iou"] < 0.6, "a pixel aside is within the tolerance"
    half = wanted.copy()
    half[:, 32:] = False
    assert edge_scores(half, wanted)["edge_precision"] == 1
    assert 0.45 < edge_scores(half, wanted)["edge_recall"] < 0.6
    assert edge_scores(np.zeros_like(wanted), wanted)["edge_f1"] == 0


def test_mean_iou_is_counted_over_all_pictures():
    a, b = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]])
    assert mean_iou([(a, b)]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_iou([(a, b), (b, b)]) == pytest.approx((2 / 3 + 5 / 6) / 2)
    assert mean_iou([(a, a)]) == 1


def test_failures_are_counted_and_controls_that_are_edges_are_the_reference():
    pictures = [edges_of(64).convert("RGB"), Image.new("RGB", (64, 64))]
    conditions = torch.stack([torch.from_numpy(np.array(edges_of(64)))[None] / 255] * 2)
    detectors = {
        "edges": EdgeDetector(),
        "mask": MaskDetector(lambda image: np.asarray(image.convert("L")) // 255 if image.getbbox() else None),
    }
    wanted = references(detectors, "canny", conditions, pictures[:1] * 2)
    assert np.array_equal(wanted["edges"][1], conditions[1, 0].numpy() > 0.5)
    result = consistency(pictures, wanted, detectors)
    assert result.failures == {"edges": 0, "mask": 1} and result.scores["mask_miou"] == 1
    assert result.each[1]["edge_f1"] == 0 and "mask_miou" not in result.each[1]
    assert result.scores["edge_f1"] == pytest.approx(result.each[0]["edge_f1"] / 2)


def test_lines_lie_over_a_picture_and_areas_by_their_borders():
    picture = Image.new("RGB", (64, 64))
    lines, area = torch.zeros(2, 1, 64, 64)
    lines[:, 20:22] = 1
    area[:, 16:32, 16:32] = 1  # a sixteenth of it
    over_lines, over_area = (np.asarray(overlay(picture, control, side=64)) for control in (lines, area))
    assert over_lines[20, 40].max() > 100 and over_lines[40, 40].max() == 0
    assert over_area[24, 24].max() == 0 and over_area[16, 24].max() > 100
