"""How well pictures show a subject and obey their prompts: DINO, CLIP-I and CLIP-T (arXiv 2208.12242, Section 4.2).

The scores are pure functions on features; encoders turn pictures and prompts into features. What is computed:

    DINO    cosine of DINO ViT-S/16 [CLS] features, mean over all real × generated pairs
    CLIP-I  cosine of CLIP's image embeddings, mean over all real × generated pairs
    CLIP-T  cosine of CLIP's embeddings of a picture and of its prompt without the rare token
    LPIPS   perceptual distance, mean over all real × generated pairs (lpips.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from finetuning.dataset.stream import to_tensor
from finetuning.errors import InputError
from finetuning.evaluation.lpips import LPIPS, SMALLEST_SIDE

# Scores: pure functions on features


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs: features (N, d) and (M, d) to (N, M) in [-1, 1]."""
    return F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T


def image_scores(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each generated picture with all real ones: (N, d), (M, d) to (N,).

    Their mean is the mean over all pairs, because each picture has as many.
    """
    return cosine(generated, real).mean(1)


def text_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosine of each picture with its own prompt: (N, d), (N, d) to (N,)."""
    return F.cosine_similarity(images.double(), texts.double(), dim=-1)


def agreement(real: torch.Tensor) -> float:
    """Mean cosine of all pairs of different real photos: what a perfect model could reach. nan for a single photo."""
    n = len(real)
    if n < 2:
        return math.nan
    return float(cosine(real, real).fill_diagonal_(0).sum() / (n * (n - 1)))


def is_blackened(image: Image.Image) -> bool:
    """Whether every pixel is black, which is how a safety filter withholds a picture."""
    return not image.convert("RGB").getbbox()


# Student's t at 97.5 %, for 1 to 30 degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; nan for a single value.

    The values must be independent: means of subjects, not pictures of one subject.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return float(values.mean()) if n else math.nan, math.nan
    t = _T[n - 2] if n - 2 < len(_T) else 1.96 + 2.4 / (n - 1)
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(n))


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
    """The scores of every picture, and those of the real photos among themselves.

    Args:
        pictures: N generated ones; texts: what each is to show, without the rare token; real: M photos.
        fidelity: column to encoder, e.g. {"DINO": …, "CLIP-I": …}; text_encoder: for CLIP-T; lpips: for LPIPS.
        advance: is told how many pictures an encoder has seen, len(fidelity) · N in all.

    Returns:
        {column: (N,)}, nan where a picture is blackened, and {column: mean over pairs of different photos}.
    """
    seen = torch.tensor([not is_blackened(picture) for picture in pictures], dtype=torch.bool)
    shown = [picture for picture, is_seen in zip(pictures, seen) if is_seen]
    scores, reference = {}, {}

    def spread(values: torch.Tensor) -> torch.Tensor:
        full = torch.full((len(pictures),), math.nan, dtype=torch.float64)
        full[seen] = values.double()
        return full

    for name, encoder in fidelity.items():
        photos, features = encoder.images(real, batch_size), []
        for batch in encoder.batches(shown, batch_size):
            features.append(batch)
            advance(len(batch))
        advance(len(pictures) - len(shown))
        features = torch.cat([photos[:0], *features])
        scores[name], reference[name] = spread(image_scores(features, photos)), agreement(photos)
        if encoder is text_encoder:
            wanted = [text for text, is_seen in zip(texts, seen) if is_seen]
            read = encoder.texts(wanted) if wanted else features
            scores["CLIP-T"] = spread(text_scores(features, read))
    if lpips is not None and shown:
        size = (max(SMALLEST_SIDE, shown[0].width), max(SMALLEST_SIDE, shown[0].height))
        generated, photos = (torch.stack([_resized(image, size) for image in images]) for images in (shown, real))
        device = lpips.shift.device
        scores["LPIPS"] = spread(lpips.pairs(generated.to(device), photos.to(device)))
        if len(real) > 1:
            n, of_photos = len(real), lpips.pairs(photos.to(device), photos.to(device))
            reference["LPIPS"] = float(of_photos.mean()) * n / (n - 1)  # a photo is at distance 0 from itself
    return scores, reference


def _resized(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    image = image.convert("RGB")
    return to_tensor(image if image.size == size else image.resize(size, Image.Resampling.BILINEAR))


# Encoders


@dataclass(frozen=True)
class Preprocessing:
    """A picture to what an encoder reads.

    Attributes:
        resize: sides (height, width) to squash to, or one number for the shorter side.
        crop: side of the square cut from the middle; None = none.
        resample: Pillow's filter, by its number (2 = bilinear, 3 = bicubic).
        mean, std: of each channel of values in [0, 1].
    """

    resize: tuple[int, int] | int
    crop: int | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, settings: dict[str, Any] | None, default: Preprocessing) -> Preprocessing:
        """From the fields of a preprocessor_config.json, as transformers writes it; None = the default."""
        if settings is None:
            return default
        size = settings.get("size", default.resize)
        if isinstance(size, dict):
            size = size.get("shortest_edge") or (size["height"], size["width"])
        elif isinstance(size, int) and not settings.get("do_center_crop"):
            size = (size, size)  # older files of image processors that squash
        crop = settings.get("crop_size", default.crop)
        return cls(
            resize=size,
            crop=(crop["height"] if isinstance(crop, dict) else crop) if settings.get("do_center_crop") else None,
            resample=int(settings.get("resample", default.resample)),
            mean=tuple(settings.get("image_mean", default.mean)),
            std=tuple(settings.get("image_std", default.std)),
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns (3, height, width), normalised."""
        image = image.convert("RGB")
        if isinstance(self.resize, int):
            scale = self.resize / min(image.size)
            size = tuple(max(self.resize, round(side * scale)) for side in image.size)
        else:
            size = (self.resize[1], self.resize[0])
        image = image if image.size == size else image.resize(size, Image.Resampling(self.resample))
        if self.crop is not None:
            x, y = ((side - self.crop) // 2 for side in image.size)
            image = image.crop((x, y, x + self.crop, y + self.crop))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def describe(self) -> dict[str, Any]:
        return asdict(self)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass
class Encoder:
    """A network that looks at pictures.

    Attributes:
        name: folder or hub name; preprocessing: what it sees of a picture.
        embed: pixels (B, 3, H, W) to features (B, d).
        embed_texts: prompts to features (B, d), for encoders that read.
    """

    name: str
    preprocessing: Preprocessing
    embed: Callable[[torch.Tensor], torch.Tensor]
    embed_texts: Callable[[Sequence[str]], torch.Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def batches(self, images: Sequence[Image.Image], batch_size: int = 16) -> Iterator[torch.Tensor]:
        """Features on the CPU in float32, batch by batch: (B, d)."""
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([self.preprocessing(image) for image in images[start : start + batch_size]])
            yield self.embed(pixels.to(self.device)).float().cpu()

    def images(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        """Features of pictures, (N, d)."""
        return torch.cat(list(self.batches(images, batch_size)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of texts, (N, d); each different text is encoded once."""
        different = list(dict.fromkeys(texts))
        features = self.embed_texts(different).float().cpu()
        return features[[different.index(text) for text in texts]]


def load_dino(name: str, device: str = "cpu", flag: str = "--dino") -> Encoder:
    """DINO's ViT, whose features are the last layer's [CLS] token.

    Raises:
        InputError: not there, not reachable, or not a ViT; names the flag that takes a local folder.
    """
    from transformers import ViTModel

    with _explained(name, flag, "vit"):
        model = ViTModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32)
        side = model.config.image_size
        preprocessing = _preprocessing(name, Preprocessing((side, side), None, 3, *IMAGENET))
    model.to(device).eval()

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels).last_hidden_state[:, 0]  # (B, tokens, d) to (B, d)

    return Encoder(name, preprocessing, embed, device=torch.device(device))


def load_clip(name: str, device: str = "cpu", flag: str = "--clip") -> Encoder:
    """CLIP, whose features are the projected embeddings of pictures and texts.

    Raises:
        InputError: as `load_dino`.
    """
    from transformers import CLIPModel, CLIPTokenizer

    with _explained(name, flag, "clip"):
        model = CLIPModel.from_pretrained(name, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(name)
        side = model.config.vision_config.image_size
        preprocessing = _preprocessing(name, Preprocessing(side, side, 3, *CLIP_COLOURS))
    model.to(device).eval()
    longest = model.config.text_config.max_position_embeddings

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    def embed_texts(texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        return model.text_projection(model.text_model(**tokens).pooler_output)

    return Encoder(name, preprocessing, embed, embed_texts, torch.device(device))


def _preprocessing(name: str, default: Preprocessing) -> Preprocessing:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # a folder without preprocessor_config.json
        settings = None
    return Preprocessing.read(settings, default)


class _explained:
    """Around the loading of an encoder: what goes wrong becomes one line that names the flag."""

    def __init__(self, name: str, flag: str, kind: str):
        self.name, self.flag, self.kind = name, flag, kind

    def __enter__(self) -> None:
        from transformers import PretrainedConfig

        if Path(self.name).is_file():
            raise InputError(f"{self.flag}={self.name}: is a file; give the folder that holds it")
        try:
            settings, _ = PretrainedConfig.get_config_dict(self.name)
        except Exception as error:
            raise self._fault(error) from error
        if "model_type" not in settings:
            raise self._fault("no model in it")
        if settings["model_type"] != self.kind:
            raise InputError(
                f"{self.flag}={self.name}: is a model of type {settings['model_type']}, not {self.kind}; "
                f"give a {self.kind} model, or none to leave its scores out"
            )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise self._fault(error) from error

    def _fault(self, error: Exception | str) -> InputError:
        text = " ".join(str(error).split())[:160]
        return InputError(
            f"{self.flag}={self.name}: cannot be loaded from a folder or from the hub; give a local folder that holds "
            f"the model ({self.flag}=FOLDER), or {self.flag}=none to leave its scores out. The library says: {text}"
        )
