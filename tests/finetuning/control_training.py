"""Runs of train_controlnet.py in this process, and small data for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from conftest import draw_photo
from PIL import Image, ImageOps
from safetensors.torch import load_file
from training import BOFT

import train_controlnet
from finetuning.run.joining import forget_processes
from finetuning.settings.reading import run_command


def control_folder(folder: Path, count: int = 6, size: tuple[int, int] = (24, 24)) -> Path:
    """Photos with inverted photos as their controls, as metadata.jsonl of `datasets` has them."""
    (folder / "controls").mkdir(parents=True)
    lines = []
    for i in range(count):
        photo = draw_photo(i, size)
        photo.save(folder / f"{i}.png")
        ImageOps.invert(photo).save(folder / "controls" / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"a photo of {i}", "conditioning_image": f"controls/{i}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def saved_dataset(folder: Path, count: int = 10, side: int = 64, split: str | None = "train") -> Path:
    """The same kind of samples as a folder of a parquet file, with the columns of diffusers' test data (fill10)."""
    import datasets

    photos = [draw_photo(i, (side, side)) for i in range(count)]
    columns = {
        "image": photos,
        "conditioning_image": [ImageOps.invert(photo) for photo in photos],
        "text": [f"a photo of {i}" for i in range(count)],
        "long": [f"a photo of {i}{' mug' * (30 if i >= 3 else 1)}" for i in range(count)],
    }
    data = datasets.Dataset.from_dict(columns)
    if split is None:
        data.save_to_disk(str(folder))
        return folder
    folder.mkdir(parents=True)
    data.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def control_flags(base: Path, data: Path, output: Path, *more: object, adapter: Sequence[str] = BOFT) -> list[str]:
    """A small run on small models; light with an adapter, full without."""
    return [
        f"--pretrained_model_name_or_path={base}",
        f"--train_data_dir={data}",
        f"--output_dir={output}",
        "--train_batch_size=2",
        "--learning_rate=1e-2",
        "--max_train_steps=4",
        "--num_inference_steps=2",
        "--held_out_images=1",
        "--report_to=none",
        *adapter,
        *map(str, more),
    ]


def run_control(*arguments: object) -> int:
    """The exit code of train_controlnet.py with these arguments."""
    forget_processes()
    return run_command(train_controlnet.main, [str(a) for a in arguments])


def control_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a result or a checkpoint."""
    return {
        f"{part}/{name}": tensor
        for part in (".", "unet", "hint_encoder", "controlnet")
        for path in sorted((folder / part).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def edges_of(size: int = 16) -> Image.Image:
    """A white square's outline on black."""
    image = Image.new("L", (size, size))
    for k in range(size // 4, 3 * size // 4):
        for place in ((k, size // 4), (k, 3 * size // 4 - 1), (size // 4, k), (3 * size // 4 - 1, k)):
            image.putpixel(place, 255)
    return image
