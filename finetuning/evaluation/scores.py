"""How well pictures show a subject and obey their prompts: DINO, CLIP-I and CLIP-T (arXiv 2208.12242, Section 4.2).

The scores are pure functions on features, which encoders make of pictures and prompts (encoders.py):

    DINO    cosine of the [CLS] features of DINO ViT-S/16, mean over all pairs of a real and a generated picture
    CLIP-I  cosine of CLIP's image embeddings, mean over all such pairs
    CLIP-T  cosine of CLIP's embeddings of a picture and of its prompt without the rare token
    LPIPS   perceptual distance, mean over all such pairs (lpips.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch.nn import functional as F

from finetuning.dataset.transform import to_tensor
from finetuning.evaluation.encoders import Encoder
from finetuning.evaluation.lpips import LPIPS, SMALLEST_SIDE


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of features: (N, d) and (M, d) to (N, M), in [-1, 1]."""
    return F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T


def image_scores(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each generated picture with all real ones: (N, d) and (M, d) to (N,).

    The mean of these scores is the mean over all pairs, because every picture has equally many pairs.
    """
    return cosine(generated, real).mean(1)


def text_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosine of each picture with its own prompt: (N, d) and (N, d) to (N,)."""
    return F.cosine_similarity(images.double(), texts.double(), dim=-1)


def agreement(real: torch.Tensor) -> float:
    """Mean cosine over all pairs of different real photos, which is what a perfect model could reach.

    Args:
        real: features (M, d).

    Returns:
        The mean, or nan for a single photo.
    """
    n = len(real)
    if n < 2:
        return math.nan
    return float(cosine(real, real).fill_diagonal_(0).sum() / (n * (n - 1)))


def is_blackened(image: Image.Image) -> bool:
    """Whether every pixel is black, which is how a safety filter withholds a picture."""
    return not image.convert("RGB").getbbox()


def score_pictures(
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    real: Sequence[Image.Image],
    *,
    fidelity: Mapping[str, Encoder],
    text_encoder: Encoder | None = None,
    lpips: LPIPS | None = None,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Score every picture, and the real photos among themselves.

    Args:
        pictures: N generated pictures.
        texts: what each of them is to show, without the rare token.
        real: M photos of the subject.
        fidelity: {score: encoder} for the scores that compare pictures with photos, e.g. {"DINO": …, "CLIP-I": …}.
        text_encoder: the encoder among them that also reads texts, for CLIP-T; None leaves CLIP-T out.
        lpips: the network for LPIPS; None leaves LPIPS out.
        batch_size: how many pictures an encoder sees at a time.
        advance: is called with the number of pictures that an encoder has just seen, len(fidelity) · N in all.

    Returns:
        {score: (N,)}, nan where a picture is blackened, and {score: mean over all pairs of different photos}.
    """
    seen = torch.tensor([not is_blackened(picture) for picture in pictures], dtype=torch.bool)
    shown = [picture for picture, is_seen in zip(pictures, seen) if is_seen]
    scores: dict[str, torch.Tensor] = {}
    reference: dict[str, float] = {}

    def of_all(values: torch.Tensor) -> torch.Tensor:
        """Scores of the pictures that are shown as scores of all, (N,): nan for those that are blackened."""
        full = torch.full((len(pictures),), math.nan, dtype=torch.float64)
        full[seen] = values.double()
        return full

    for name, encoder in fidelity.items():
        photos, batches = encoder.images(real, batch_size), []
        for batch in encoder.batches(shown, batch_size):
            batches.append(batch)
            advance(len(batch))
        advance(len(pictures) - len(shown))
        features = torch.cat([photos[:0], *batches])
        scores[name], reference[name] = of_all(image_scores(features, photos)), agreement(photos)
        if encoder is text_encoder:
            wanted = [text for text, is_seen in zip(texts, seen) if is_seen]
            scores["CLIP-T"] = of_all(text_scores(features, encoder.texts(wanted) if wanted else features))
    if lpips is not None and shown:
        distances, among_photos = _perceptual_distances(shown, real, lpips)
        scores["LPIPS"] = of_all(distances)
        if len(real) > 1:
            reference["LPIPS"] = among_photos
    return scores, reference


def _perceptual_distances(
    pictures: Sequence[Image.Image], real: Sequence[Image.Image], lpips: LPIPS
) -> tuple[torch.Tensor, float]:
    """Mean distance of each picture to all photos, (N,), and mean distance of different photos; nan for one photo."""
    size = (max(SMALLEST_SIDE, pictures[0].width), max(SMALLEST_SIDE, pictures[0].height))
    generated, photos = (
        torch.stack([_resized(image, size) for image in images]).to(lpips.shift.device) for images in (pictures, real)
    )
    distances, m = lpips.pairs(generated, photos), len(real)
    if m == 1:
        return distances, math.nan
    return distances, float(lpips.pairs(photos, photos).mean()) * m / (m - 1)  # a photo is at distance 0 from itself


def _resized(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    image = image.convert("RGB")
    return to_tensor(image if image.size == size else image.resize(size, Image.Resampling.BILINEAR))
