"""Networks that turn pictures and prompts into features, which scores compare: DINO's ViT and CLIP.

An encoder brings its own preprocessing, as transformers writes it into preprocessor_config.json. It is done here with
Pillow: transformers' image processors read the same file, but resize by Pillow in some versions and by torchvision in
others, and scores must not change with the version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetuning.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of each channel
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Preprocessing:
    """Turns a picture into the tensor that an encoder reads: resized, cropped and normalised.

    Attributes:
        resize: (height, width) that the picture is squashed to, or one number, which its shorter side becomes.
        crop: side of the square that is cut from the middle afterwards; None cuts nothing.
        resample: Pillow's filter for resizing, by its number (2 is bilinear, 3 is bicubic).
        mean, std: mean and standard deviation of each channel, for values in [0, 1].
    """

    resize: tuple[int, int] | int
    crop: int | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, settings: dict[str, Any] | None, default: Preprocessing) -> Preprocessing:
        """Preprocessing by the fields of a preprocessor_config.json, as transformers writes it.

        Args:
            settings: the file's fields, or None where there is no such file; then the default is returned.
            default: what holds for fields that the file lacks.
        """
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
        """Returns the picture as (3, height, width), normalised."""
        image = image.convert("RGB")
        if isinstance(self.resize, int):
            scale = self.resize / min(image.size)
            width, height = (max(self.resize, round(side * scale)) for side in image.size)
        else:
            height, width = self.resize
        size = (width, height)
        image = image if image.size == size else image.resize(size, Image.Resampling(self.resample))
        if self.crop is not None:
            x, y = ((side - self.crop) // 2 for side in image.size)
            image = image.crop((x, y, x + self.crop, y + self.crop))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def describe(self) -> dict[str, Any]:
        """The settings by their names, as they are stated beside a score."""
        return asdict(self)


@dataclass
class Encoder:
    """A network that turns pictures, and perhaps texts, into features.

    Attributes:
        name: the folder or the hub name that it was loaded from.
        preprocessing: turns a picture into what the network reads.
        embed: maps pixels (B, 3, H, W) to features (B, d).
        embed_texts: maps B texts to features (B, d); None for a network that reads no text.
        device: where the network is.
    """

    name: str
    preprocessing: Preprocessing
    embed: Callable[[torch.Tensor], torch.Tensor]
    embed_texts: Callable[[Sequence[str]], torch.Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def batches(self, images: Sequence[Image.Image], batch_size: int = 16) -> Iterator[torch.Tensor]:
        """Yields the features of the pictures, (B, d) for each batch, in float32 on the CPU."""
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([self.preprocessing(image) for image in images[start : start + batch_size]])
            yield self.embed(pixels.to(self.device)).float().cpu()

    def images(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        """Features of N pictures, (N, d), in float32 on the CPU. N is at least 1."""
        return torch.cat(list(self.batches(images, batch_size)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of N texts, (N, d), in float32 on the CPU; a text that occurs several times is encoded once.

        Raises:
            ValueError: if this network reads no text.
        """
        if self.embed_texts is None:
            raise ValueError(f"{self.name} encodes pictures only")
        different = list(dict.fromkeys(texts))
        features = self.embed_texts(different).float().cpu()
        return features[[different.index(text) for text in texts]]


def load_dino(name: str, device: str | torch.device = "cpu", flag: str = "--dino") -> Encoder:
    """Load DINO's ViT; its features are the [CLS] token of the last layer.

    Args:
        name: a folder in transformers' format, or a name on the hub.
        flag: the flag that gave the name; errors name it.

    Raises:
        InputError: if the model cannot be found or loaded, or is not a ViT.
    """
    from transformers import ViTModel

    with _errors_named(name, flag, "vit"):
        model = ViTModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32)
        side = model.config.image_size
        preprocessing = _preprocessing(name, Preprocessing((side, side), None, 3, *IMAGENET))
    model.to(device).eval()

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels).last_hidden_state[:, 0]  # (B, tokens, d) to (B, d)

    return Encoder(name, preprocessing, embed, device=torch.device(device))


def load_clip(name: str, device: str | torch.device = "cpu", flag: str = "--clip") -> Encoder:
    """Load CLIP; its features are the projected embeddings of pictures and of texts.

    Args:
        name: a folder in transformers' format, or a name on the hub.
        flag: the flag that gave the name; errors name it.

    Raises:
        InputError: if the model cannot be found or loaded, or is not CLIP.
    """
    from transformers import CLIPModel, CLIPTokenizer

    with _errors_named(name, flag, "clip"):
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
    """The preprocessing that lies beside a model's weights, or else the default."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # a folder without preprocessor_config.json
        settings = None
    return Preprocessing.read(settings, default)


@contextmanager
def _errors_named(name: str, flag: str, kind: str) -> Iterator[None]:
    """Turns any loading error of the library into one InputError that names the flag and its value.

    Args:
        kind: the model_type that the model's configuration must state, e.g. "vit".
    """
    from transformers import PretrainedConfig

    if Path(name).is_file():
        raise InputError(f"{flag}={name}: is a file; give the folder that holds it")
    try:
        found = PretrainedConfig.get_config_dict(name)[0].get("model_type")
        if found is None:
            raise ValueError("no model in it")
        if found != kind:
            raise InputError(
                f"{flag}={name}: is a model of type {found}, not {kind}; give a {kind} model, or none to leave its "
                "scores out"
            )
        yield
    except InputError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise InputError(
            f"{flag}={name}: cannot be loaded from a folder or from the hub; give a local folder that holds the model "
            f"({flag}=FOLDER), or {flag}=none to leave its scores out. The library says: {text}"
        ) from error
