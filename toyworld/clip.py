"""The small CLIP: contrastive training of captions and renders; its text tower is the pipeline's text encoder.

The contrast has many positives: a caption fits every picture in the batch of which it is true. Linear heads on both
embeddings name the attributes; they are thrown away afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from . import renders
from .captions import caption, caption_vocabulary, plain_caption
from .loop import fit, muon
from .scene import CATEGORIES, COLOURS, CONTEXTS, PATTERNS
from .vae import pixels

BATCH, WIDTH = 128, 128
COUNTS = (len(CATEGORIES), len(COLOURS), len(PATTERNS), len(CONTEXTS))
NAMES = ("category", "colour", "pattern", "context")


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of two million parameters for 64 px and the tokenizer's length."""
    size = len(tokenizer)
    config = CLIPConfig(
        text_config={
            "vocab_size": size,
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "projection_dim": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": size - 2,
            "eos_token_id": size - 1,
            "pad_token_id": size - 1,
        },
        vision_config={
            "hidden_size": 160,
            "intermediate_size": 480,
            "projection_dim": WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        projection_dim=WIDTH,
    )
    config._attn_implementation = "eager"  # the fused attention's backward pass is slow on a CPU
    return CLIPModel(config)


class _Student(nn.Module):
    """CLIP with the heads that help it to learn."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in COUNTS)


def embed_images(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit embeddings (N, 128) of images (N, 3, 64, 64) in [-1, 1]."""
    return F.normalize(clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output).float(), dim=-1)


def embed_tokens(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Unit embeddings (N, 128) of token ids (N, L)."""
    pooled = clip.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


def encoder_of(tokenizer: CLIPTokenizer) -> Callable[[Sequence[str]], torch.Tensor]:
    """A function from N texts to their padded ids (N, L), which remembers the texts that it has seen."""

    @cache
    def ids(text: str) -> list[int]:
        return tokenizer(text, padding="max_length", truncation=True).input_ids

    return lambda texts: torch.tensor([ids(text) for text in texts])


def train(images: np.ndarray, tokenizer: CLIPTokenizer, folder: Path, steps: int) -> CLIPModel:
    """Train on the set "train" of renders and return the model."""
    torch.manual_seed(1)
    student = _Student(build(tokenizer))
    clip, heads = student.clip, student.heads
    attributes, tokens = torch.from_numpy(renders.attributes("train", len(images))), encoder_of(tokenizer)

    def loss_of(generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(images), (BATCH,), generator=generator).sort().values
        rng = random.Random(step)
        captions = [caption(renders.scene("train", i), rng) for i in index.tolist()]
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        x, truth = torch.roll(pixels(images[index.numpy()]), shift, (2, 3)), attributes[index]
        ids, stated = tokens([c.text for c in captions]), torch.tensor([c.stated for c in captions])
        with torch.autocast("cpu", torch.bfloat16):
            image, text = embed_images(clip, x), embed_tokens(clip, ids)
        fits = ((stated[None] == -1) | (stated[None] == truth[:, None])).all(-1).float()  # (images, captions)
        logits = image @ text.T * clip.logit_scale.exp().clamp(max=60)
        by_image = -(fits / fits.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        by_text = -(fits / fits.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
        named = sum(
            F.cross_entropy(head(10 * image), truth[:, k], ignore_index=-1)
            + 0.5 * F.cross_entropy(head(10 * text), stated[:, k], ignore_index=-1)
            for k, head in enumerate(heads)
        )
        loss = 0.5 * (by_image + by_text) + 0.5 * named
        return loss, {"contrast": (by_image + by_text).item(), "names": float(named)}

    fit("clip", student, loss_of, steps=steps, folder=folder, optimizer=muon(student, 1e-3, 0.02))
    with torch.no_grad():  # words of no caption look like words, of no meaning
        seen = torch.zeros(len(tokenizer), dtype=torch.bool)
        seen[tokens(caption_vocabulary()).unique()] = True
        table = clip.text_model.embeddings.token_embedding.weight
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(table[~seen].shape, generator=generator)
        table[~seen] = table[seen].mean(0) + noise * table[seen].std()
    return clip


@torch.no_grad()
def zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share of images (N, 64, 64, 3) whose attribute is the one of the nearest caption, per attribute.

    The captions name the category alone, or the true category and one value of the attribute.
    """
    image, tokens = (
        torch.cat([embed_images(clip, pixels(part)) for part in np.array_split(images, 16)]),
        encoder_of(tokenizer),
    )
    values = {"colour": list(COLOURS), "pattern": list(PATTERNS), "context": list(CONTEXTS)}
    nearest = (image @ embed_tokens(clip, tokens([plain_caption(c) for c in CATEGORIES])).T).argmax(1).numpy()
    result = {"category": float((nearest == truth[:, 0]).mean())}
    for k, (name, options) in enumerate(values.items(), 1):
        right = []
        for c, category in enumerate(CATEGORIES):
            rows = (truth[:, 0] == c) & (truth[:, k] >= 0)
            text = embed_tokens(clip, tokens([plain_caption(category, **{name: option}) for option in options]))
            right.append((image[rows] @ text.T).argmax(1).numpy() == truth[rows, k])
        result[name] = float(np.concatenate(right).mean())
    return result
