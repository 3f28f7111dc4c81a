"""What the shipped base, CLIP and judge can do: every number that data/README.md states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageFilter
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from . import clip, renders, subjects, vae
from .captions import plain_caption
from .judge import ATTRIBUTES, AttributeJudge, InstanceJudge
from .render import contact_sheet, render
from .scene import CATEGORIES, COLOURS, CONTEXTS, PATTERNS
from .segmentation import SegmentationJudge, mean_iou

STEPS, GUIDANCE = 25, 3.0


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A pipeline in float32, with the attention that is fastest on a CPU."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipeline.unet.set_attn_processor(AttnProcessor())
    return pipeline


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def load_clip(folder: Path) -> CLIPModel:
    """The small CLIP in float32."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
    batch: int = 40,
) -> np.ndarray:
    """Pictures of prompts, one per seed: uint8 (N, 64, 64, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in tqdm(range(0, len(prompts), batch), desc="generating", unit="batch", leave=False):
        part = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            images = pipeline(
                list(prompts[part]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
            ).images
        pictures.append((images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def held_out(name: str, count: int) -> np.ndarray:
    """The first pictures of a set of renders, uint8 (N, 64, 64, 3)."""
    return np.stack([np.asarray(render(renders.scene(name, index)).image) for index in range(count)])


def blurred(images: np.ndarray, radius: float = 1.0) -> np.ndarray:
    """Gaussian blur by `radius` px."""
    return np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius))) for x in images])


def accuracy(judge: AttributeJudge, images: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share of images whose attribute the judge reads as in `truth` (N, 4), per attribute; -1 does not count."""
    read = judge.read(images)
    return {name: float((read[:, k] == truth[:, k])[truth[:, k] >= 0].mean()) for k, name in enumerate(ATTRIBUTES)}


def nearest_is_same(judge: InstanceJudge, images: np.ndarray, views: int = renders.VIEWS) -> float:
    """Share of pictures, `views` of each individual in a row, whose nearest one of their category shows the same."""
    z = judge.embed(images)
    who = torch.arange(len(z)) // views
    category = [renders.individual("heldout_individuals", int(k)).category for k in who]
    kind = torch.tensor([CATEGORIES.index(c) for c in category])
    similarity = (z @ z.T).masked_fill(kind[:, None] != kind, -2).fill_diagonal_(-2)
    return float((who[similarity.argmax(1)] == who).float().mean())


def prompt_grid(count: int = 480) -> tuple[list[str], np.ndarray]:
    """Prompts over all categories and contexts, with colours and patterns at random, and their attributes (N, 4)."""
    rng, prompts, truth = np.random.default_rng(3), [], []
    for k in range(count):
        c, x = k % len(CATEGORIES), (k // len(CATEGORIES)) % len(CONTEXTS)
        colour, pattern = int(rng.integers(len(COLOURS))), int(rng.integers(len(PATTERNS)))
        words = {"colour": list(COLOURS)[colour], "pattern": PATTERNS[pattern], "context": CONTEXTS[x]}
        prompts.append(plain_caption(CATEGORIES[c], **words))
        truth.append((c, colour, pattern, x))
    return prompts, np.array(truth)


def measure(folder: Path, count: int = 480, renders_count: int = 2000) -> dict:
    """Measure what lies in `folder`; also writes base_samples.png there: the first 108 pictures, in order."""
    pipeline = load_pipeline(folder / "base")
    words, model = CLIPTokenizer.from_pretrained(folder / "clip"), load_clip(folder / "clip")
    reader = AttributeJudge.load(folder / "judge" / "attributes")
    identifier = InstanceJudge.load(folder / "judge" / "instances")
    segments = SegmentationJudge.load(folder / "judge" / "segmentation")
    images, truth = held_out("heldout", renders_count), renders.attributes("heldout", renders_count)
    photos = np.concatenate([subjects.photos(name) for name in subjects.SUBJECTS])
    result: dict = {
        "vae_psnr_db": {
            "held-out renders": vae.psnr(pipeline.vae, images[:256]),
            "subjects": vae.psnr(pipeline.vae, photos),
        },
        "clip_zero_shot": clip.zero_shot(model, words, images, truth),
        "judge_on_renders": accuracy(reader, images, truth),
        "judge_on_blurred_renders": accuracy(reader, blurred(images), truth),
        "judge_segments_renders": mean_iou(segments),
        "judge_segments_blurred_renders": mean_iou(segments, blur=1.0),
        "judge_finds_the_same_individual": nearest_is_same(identifier, held_out("heldout_individuals", 1600)),
    }
    prompts, wanted = prompt_grid(count)
    pictures = generate(pipeline, prompts, range(count))
    result["base"] = {"images": count, "steps": STEPS, "guidance": GUIDANCE, **accuracy(reader, pictures, wanted)}
    rows = [[Image.fromarray(x) for x in pictures[r : r + 12]] for r in range(0, min(count, 108), 12)]
    contact_sheet(rows).save(folder / "base_samples.png", optimize=True)
    return result
