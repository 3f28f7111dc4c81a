"""Damaged and odd data of every kind, by chance: both trainers take all its samples, or refuse it by one InputError.

Never another exception, a hang, a number outside of its range, or a changed file. Each case is decided by its seed:

    python -m pytest tests/test_fuzz_data.py -k "[17]"
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import numpy as np
import pytest
import torch
from conftest import draw_photo
from control_training import control_folder
from PIL import Image

from finetuning.control.builders import build_streams
from finetuning.control.hub_source import read_split
from finetuning.control.stream import ControlStream
from finetuning.dataset.stream import ImageStream, Transform, find_examples
from finetuning.errors import InputError
from finetuning.models.loading import load_stable_diffusion
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.reading import read_config
from toyworld.controls import Controls

CASES = 150
SECONDS = 180  # after which a case counts as a hang
IMAGES = 4
VALUES = [
    None, 0, 1.5, -1, True, [], {}, "", " ", ["a", "b"], ["a", 1], {"a": 1}, "a\u2028b", "\ud800", "é", "mug " * 99,
    "0.png", "controls/1.png", "../x.png", "x" * 300, float("nan"), 10**40, "a\0b", ".",
]  # fmt: skip
MODES = ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
TYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", ">u2", "u4", "f2", "f4", "f8", "c8", "U3", "S2", "M8[s]", "O", "V4"]
NAMES = [
    "é.png", "²3.png", "1².png", ".png", "._0.png", "a\nb.png", "0.PNG", "0.jpg", "0.txt.png", "\udce9.png", "-.png",
    "x" * 250 + ".png", "0.heic", "0.svg", "metadata.csv", "0.npy", "0.caption", "0.TXT", "Thumbs.db",
]  # fmt: skip
ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift-jis", "ascii"]


# Bytes


def damaged(random: Random, data: bytes) -> bytes:
    """Cut, with other bytes, or other altogether."""
    kind, content = random.randrange(7), bytearray(data)
    if kind == 0:
        return data[: random.randrange(len(data) + 1)]
    if kind == 1:
        for _ in range(random.choice((1, 3, 30))):
            if content:
                content[random.randrange(min(len(content), random.choice((40, 10**9))))] = random.randrange(256)
    elif kind == 2 and len(content) > 8:
        start = random.randrange(len(content) - 4)
        content[start : start + random.randrange(1, 64)] = bytes(random.randrange(4))
    elif kind == 3:
        content += random.randbytes(random.randrange(1, 200))
    elif kind == 4:
        return b""
    elif kind == 5:
        return random.randbytes(random.randrange(1, 400))
    elif kind == 6:
        start = random.randrange(len(content) + 1)
        content[start:start] = content[: random.randrange(100)]
    return bytes(content)


def huge(random: Random) -> bytes:
    """The beginning of a PNG, BMP, TIFF or GIF that says how large it is."""
    side = random.choice((5_000, 20_000, 60_000))
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, random.choice((8, 16)), random.choice((0, 2, 6)), 0, 0, 0)
    tags = [(256, side), (257, side), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 2**31)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return random.choice((
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)),
        b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4),
        b"GIF89a" + struct.pack("<HHBBBBHHHHBB", side, side, 0, 0, 0, 44, 0, 0, side, side, 0, 2),
    ))  # fmt: skip


def odd_exif(random: Random) -> bytes:
    """Tags of any type, and an orientation of any."""
    tags = [0x010E, 0x011A, 0x011B, 0x0131, 0x8769, 0x8825, 0x9286, 0x0112, random.randrange(65536)]
    chosen = sorted(random.sample(tags, random.randrange(1, 6)))
    entries = b"".join(
        struct.pack("<HHI", tag, random.randrange(14), random.choice((0, 1, 2, 5, 2**31))) + random.randbytes(4)
        for tag in chosen
    )
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, random.randrange(10), 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(chosen) + 1) + turned + entries + random.randbytes(20)


def picture(random: Random) -> bytes:
    """A picture that is whole, of an odd kind."""
    image = draw_photo(random.randrange(9)).resize(random.choice(((24, 24), (24, 20), (7, 30), (1, 1), (300, 8))))
    ending = random.choice(("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"))
    mode, data = random.choice([*MODES, *["RGB"] * 9]), io.BytesIO()
    options = {"exif": odd_exif(random)} if ending in ("PNG", "JPEG", "WEBP") and random.random() < 0.6 else {}
    if random.random() < 0.2:
        options |= {"save_all": True, "append_images": [draw_photo(8, image.size)]}
    try:
        deep = np.asarray(image.convert("L"), np.uint16) * random.choice((1, 16, 257))
        image = Image.fromarray(deep) if mode == "I;16" else image.convert(mode)
        image.save(data, format=ending, **options)
    except Exception:  # what Pillow cannot write
        data = io.BytesIO()
        draw_photo(0).save(data, format="PNG")
    return data.getvalue()


def array(random: Random) -> bytes:
    odd = [(3, 24, 24), (24,), (), (0, 24), (1, 24, 24, 3), (20, 24)]
    shape = random.choice([(24, 24), (24, 24, 3), (24, 24, 1), *odd])
    data = io.BytesIO()
    with np.errstate(all="ignore"):
        values = np.random.default_rng(random.randrange(99)).uniform(0, random.choice((1, 2, 300)), shape)
        if random.random() < 0.3 and values.size:
            values.flat[0] = random.choice((np.nan, np.inf, -1))
        kind = random.choice([*TYPES, *["f4", "u1"] * 4])
        values = np.zeros(shape, kind) if kind[0] in "MOV" else values.astype(kind)
    np.save(data, values, allow_pickle=True)
    found = data.getvalue()
    return found.replace(b"(24, 24", b"(99999999, 24", 1) if random.random() < 0.1 else found


# Folders


def mutate_image(random: Random, folder: Path) -> None:
    path = folder / random.choice(("", "controls")) / f"{random.randrange(IMAGES)}.png"
    whole = path.read_bytes() if path.is_file() else b"x"
    kind = random.randrange(8)
    if kind in (4, 5, 6):
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        if kind == 4:
            path.mkdir()
        elif kind == 5:
            path.symlink_to(random.choice(("nowhere", path.name, "/dev/zero", "controls")))
        else:
            os.mkfifo(path)
    elif not path.is_dir():
        path.unlink(missing_ok=True)
        made = picture(random)
        data = {0: damaged(random, whole), 1: made, 2: damaged(random, made), 3: huge(random)}.get(kind, array(random))
        path.write_bytes(data)


def mutate_names(random: Random, folder: Path) -> None:
    place = folder / random.choice(("", "controls"))
    name = unicodedata.normalize(random.choice(("NFC", "NFD")), random.choice(NAMES))
    image = place / f"{random.randrange(IMAGES)}.png"
    if random.random() < 0.3 and image.is_file():
        image.replace(place / name)
    elif not (place / name).exists():
        (place / name).write_bytes(random.choice((draw_photo(1).tobytes(), picture(random), b"a mug", b"")))


def mutate_caption(random: Random, folder: Path) -> None:
    path = folder / f"{random.randrange(IMAGES)}{random.choice(('.txt', '.caption', '.TXT'))}"
    text = random.choice(("a mug", "a mug " * 40, "", "caf\u00e9\u2028ソ", "\ufeff\ufeffa", "a\r\nb", "\0"))
    if random.random() < 0.1:
        path.mkdir(exist_ok=True)
    elif path.is_file() or not path.exists():
        data = text.encode(random.choice(ENCODINGS), "replace")
        path.write_bytes(random.choice((data, damaged(random, data))))


def mutate_metadata(random: Random, folder: Path) -> None:
    path, kind = folder / "metadata.jsonl", random.randrange(8)
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    place = random.randrange(max(1, len(lines) - 1))
    if kind <= 2:
        try:
            entry = json.loads(lines[place])
            entry[random.choice([*entry, "text", "prompt"])] = random.choice(VALUES)
            lines[place] = json.dumps(entry).encode()
        except (ValueError, TypeError):
            lines[place] = b"{}"
    elif kind == 3:
        odd = (b"[" * 50_000, b"null", b"{", b"\xff\xfe{", b'{"file_name": "0.png"}', b"\x85", b"")
        lines[place] = random.choice(odd)
    elif kind == 4:
        lines.append(random.choice(lines))
    elif kind == 5:
        lines = b"\n".join(lines).decode("utf-8", "replace").encode(random.choice(ENCODINGS), "replace").split(b"\n")
    elif kind == 6:
        lines = damaged(random, b"\n".join(lines)).split(b"\n")
    path.write_bytes(b"\n".join(lines))
    if kind == 7:
        path.unlink()
        random.choice((lambda: path.mkdir(), lambda: path.symlink_to("nowhere"), lambda: None))()


def mutate_array(random: Random, folder: Path) -> None:
    """A control of an array in the place of an image, which metadata.jsonl names."""
    index, made = random.randrange(IMAGES), array(random)
    path, metadata = folder / "controls" / f"{index}.png", folder / "metadata.jsonl"
    if path.is_file() and metadata.is_file():
        path.unlink()
        path.with_suffix(".npy").write_bytes(damaged(random, made) if random.random() < 0.4 else made)
        name = f"controls/{index}".encode()
        metadata.write_bytes(metadata.read_bytes().replace(name + b".png", name + b".npy"))


MUTATIONS = [mutate_image, mutate_image, mutate_names, mutate_caption, mutate_metadata, mutate_array]


# What the trainers do before their first step


def contents(folder: Path) -> dict[str, tuple]:
    """Every entry below a folder, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_plain = path.is_file() and not path.is_symlink()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if is_plain else ""
        found[str(path)] = (path.lstat().st_mode, path.lstat().st_mtime_ns, digest)
    return found


def take_photos(folder: Path, base: StableDiffusion) -> None:
    stream = ImageStream("instance", find_examples(folder, "a mug", "--f"), Transform(16, random_flip=True), 0)
    stream.check()
    base.check_captions([(e.origin, e.prompt) for e in stream.examples if e.origin], "refuse")
    stream.is_cacheable()
    assert stream.fingerprint()
    for position in range(len(stream.examples)):
        pixels, prompt, _ = stream[position]
        assert pixels.shape == (3, 16, 16) and pixels.abs().max() <= 1 and isinstance(prompt, str)


def take_controls(stream: ControlStream, base: StableDiffusion, count: int = 500) -> None:
    stream.check(count, 0 if count == 0 else 1e9)
    base.check_captions(stream.captions(), "refuse")
    if count == 0:
        return  # only headers were looked at
    assert stream.fingerprint()
    for position in range(stream.size):
        pixels, condition, prompt, _ = stream[position]
        assert pixels.shape == condition.shape == (3, 16, 16) and pixels.abs().max() <= 1
        assert (
            torch.isfinite(condition).all()
            and condition.min() >= 0
            and condition.max() <= 1
            and isinstance(prompt, str)
        )


def table(folder: Path) -> dict:
    """A data set of the bytes of what is in the folder."""
    import datasets

    def encoded(path):
        return {"bytes": path.read_bytes(), "path": path.name} if path.is_file() and path.lstat().st_size else None

    files = [(folder / f"{i}.png", folder / "controls" / f"{i}.png") for i in range(IMAGES)]
    files = [(a, b) for a, b in files if not (a.is_symlink() or b.is_symlink())]
    columns = zip(*[(encoded(a), encoded(b), "a mug") for a, b in files])
    data = datasets.Dataset.from_dict(dict(zip(("image", "map", "text"), map(list, columns))))
    for column in ("image", "map"):
        data = data.cast_column(column, datasets.Image())
    return {"train": data}


def ways(folder: Path, base: StableDiffusion) -> dict[str, Callable[[], None]]:
    """The forms of data that this folder can be taken for."""

    def controls(*flags: str, count: int = 500):
        arguments = [f"--train_data_dir={folder}", "--resolution=16", "--held_out_images=1", *flags]
        data = read_config(ControlNetConfig, [*arguments, "--max_train_steps=1", "--random_flip"]).data
        for stream in build_streams(data, 3, 0, Controls):
            take_controls(stream, base, count)

    def rows():
        names = {"image": "image", "condition": "map", "caption": "text"}
        source = read_split(table(folder), "train", flag="--train_split", **names)
        take_controls(ControlStream("train", source, Transform(16), 0), base)
        take_controls(ControlStream("train", source, Transform(16), 0), base, count=0)

    return {
        "photos": lambda: take_photos(folder, base),
        "controls that are photos": lambda: take_photos(folder / "controls", base),
        "metadata": controls,
        "headers": lambda: controls(count=0),
        "canny": lambda: controls("--conditioning=canny"),
        "partners": lambda: controls(f"--conditioning_data_dir={folder / 'controls'}"),
        "rows": rows,
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return control_folder(tmp_path_factory.mktemp("template") / "data", IMAGES)


@pytest.fixture(scope="module")
def base(toy_base) -> StableDiffusion:
    return load_stable_diffusion(str(toy_base))


def expire(*_):
    raise TimeoutError(f"still busy after {SECONDS} s")


@pytest.mark.parametrize("seed", range(CASES))
def test_taken_as_a_whole_or_refused_by_name(seed, template, base, tmp_path):
    random, folder = Random(seed), tmp_path / "data"
    shutil.copytree(template, folder)
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(MUTATIONS)(random, folder)
    before = contents(folder)
    signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        for take in ways(folder, base).values():
            try:
                take()
            except InputError as error:
                assert error.faults and all(fault and "Traceback" not in fault for fault in error.faults)
    finally:
        signal.alarm(0)
    assert contents(folder) == before


def test_without_a_mutation_all_is_taken(template, base):
    for take in ways(template, base).values():
        take()
