"""Image files: which there are in a folder, and what they show, upright and in 8 bits."""

from __future__ import annotations

import logging
import re
import struct
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, features

from finetuning.errors import InputError

logger = logging.getLogger(__name__)

READS_AVIF = "avif" in features.modules and features.check("avif")
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", *([".avif"] if READS_AVIF else []),
)  # fmt: skip
CAPTION_SUFFIXES = (".txt", ".caption")
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIC_REMEDY = (
    "HEIC cannot be read; convert it to JPEG, e.g. by `magick mogrify -format jpg *.heic` or, on a Mac, "
    "`sips -s format jpeg *.heic --out .`"
)
COMPANIONS = ("subject.json", "metadata.jsonl", "record.json")  # known to lie beside images
SMALLEST_SIDE = 8
SEQUENCES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # may hold several pictures; MPO's others show the same photo again
ORIENTATION = 0x0112  # of EXIF
SHORT = 3  # type of its value
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_PLACES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow finds an orientation
DARKEST = 16384  # of 65535: a quarter, which is what 14 bits reach


# Folders


def find_images(folder: str | Path, flag: str) -> list[Path]:
    """Image files of a folder, in the order of their names with numbers counted (2 before 10).

    Stray files, and subfolders that hold images, are named in the log and skipped.

    Raises:
        InputError: no folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{flag}={folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{flag}={folder}: is a file; give the folder that holds the images")
    try:
        entries = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=_natural)
        folders = [p for p in entries if p.is_dir()]
        files = [p for p in entries if p.is_file() or not p.exists()]  # or a link that leads nowhere
    except PermissionError:
        raise InputError(f"{flag}={folder}: may not be read; change its permissions") from None
    images = [p for p in files if is_image_file(p)]
    stems = {composed(p.stem) for p in images}
    captions = [p for p in files if p.suffix.lower() in CAPTION_SUFFIXES and composed(p.stem) in stems]
    known = {*images, *captions, *folders}
    strays = [p.name for p in entries if p not in known and p.name not in COMPANIONS]
    heic = f"; {HEIC_REMEDY}" if any(p.suffix.lower() in HEIC_SUFFIXES for p in files) else ""
    if strays:
        logger.warning("%s: skipped, not images: %s%s", folder, ", ".join(strays), heic)
    if skipped := [p.name for p in folders if p.suffix.lower() in IMAGE_SUFFIXES or _holds_images(p)]:
        logger.warning("%s: subfolders are not searched for images: %s", folder, ", ".join(skipped))
    if not images:
        found = f"; only its subfolders {', '.join(skipped)} do, give one of them" if skipped else ""
        raise InputError(f"{flag}={folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}){found}{heic}")
    return images


def is_image_file(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Whether it is a file, or a link that leads nowhere, and is named as an image that is not hidden.

    Pipes and devices are none: whoever opens them may wait for ever.
    """
    is_named = path.suffix.lower() in suffixes and not path.name.startswith(".")
    return is_named and (path.is_file() or not path.exists())


def composed(name: str) -> str:
    """A name to compare by: an é of one character, and one of e and an accent, are the same."""
    return unicodedata.normalize("NFC", name)


def _holds_images(folder: Path) -> bool:
    try:
        return any(is_image_file(p) for p in folder.iterdir())
    except OSError:
        return False


def _natural(path: Path) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


# Pictures


def open_image(path: Path) -> Image.Image:
    """An image as upright 8-bit RGB: EXIF rotation applied, transparency on white, 16-bit grey scaled down.

    Raises:
        InputError: corrupt, truncated, too small or too large, of unknown range, or several pictures; names the file.
    """
    return to_rgb(read_picture(path, str(path)), str(path))


def read_picture(file: Path | BytesIO, name: str, kind: str = "image") -> Image.Image:
    """The picture of a file as it was saved, in its own mode, upright.

    Args:
        name, kind: stand in an error.

    Raises:
        InputError: corrupt, truncated, too large, or of several pictures.
    """
    with naming(name, kind, file), Image.open(file) as image:
        refuse_sequence(image, name)
        _refuse_odd_grey(image, name)
        image.load()
        return upright(image)


def verify_picture(file: Path | BytesIO, name: str, kind: str = "image") -> tuple[int, int]:
    """The sides of a picture, the shorter one first, from its header; pixels are not decoded.

    Raises:
        InputError: no image, or what can be known of the file's integrity without decoding it.
    """
    with naming(name, kind, file), Image.open(file) as image:
        refuse_sequence(image, name)
        _refuse_odd_grey(image, name)
        image.verify()
        return tuple(sorted(image.size))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An open, upright image in 8-bit RGB; `name` stands in the error.

    Raises:
        InputError: too small, of unknown range, or of colours that cannot be converted.
    """
    if min(image.size) < SMALLEST_SIDE:
        raise InputError(f"{name}: {image.width}×{image.height} pixels are too few to learn from; remove it")
    with naming(name):
        if image.mode in ("I", "F"):
            raise InputError(
                f"{name}: 32-bit {'whole' if image.mode == 'I' else 'floating-point'} numbers have no known range; "
                "save it in 8 or 16 bits"
            )
        if image.mode.startswith("I;16"):
            image = _eight_bits(image, name)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """A copy that is turned as its EXIF says, whatever else is in that."""
    if (turn := TURNS.get(_orientation(image))) is None:
        return image.copy()
    turned = image.transpose(turn)
    for place in EXIF_PLACES:  # it would be turned again by whoever looks there
        turned.info.pop(place, None)
    return turned


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """What `open_image` makes of a file, for an image that is open; `name` stands in the error."""
    return to_rgb(upright(image), name)


def refuse_sequence(image: Image.Image, name: str) -> None:
    """Raises InputError for an animation, or pages."""
    count = getattr(image, "n_frames", 1) if image.format in SEQUENCES else 1
    if count > 1:
        raise InputError(f"{name}: holds {count} pictures; save the one that it is about as a file of its own")


@contextmanager
def naming(name: str, kind: str = "image", file: Path | BytesIO | None = None) -> Iterator[None]:
    """Whatever decoding raises, as an InputError that names the file: decoders raise anything for damaged files."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, without the file's name
            yield
    except InputError:
        raise
    except Exception as error:
        if _is_heic(file):
            raise InputError(f"{name}: not a readable {kind}: {HEIC_REMEDY}") from None
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: not a readable {kind} ({said}); replace or remove it") from None


def _orientation(image: Image.Image) -> object:
    """1 to 8, or something else where none is known. Pillow does not read EXIF beyond a damaged entry: look first."""
    data = image.info.get("exif")
    data = data.removeprefix(b"Exif\0\0") if isinstance(data, bytes) else b""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    try:
        if order:
            (start,) = struct.unpack_from(f"{order}4xI", data)
            (count,) = struct.unpack_from(f"{order}H", data, start)
            for entry in range(count):
                tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, start + 2 + 12 * entry)
                if (tag, kind) == (ORIENTATION, SHORT):
                    return value
    except struct.error:  # it ends early
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ORIENTATION)
    except Exception:  # EXIF that cannot be read says nothing; viewers of pictures do the same
        return None


def _refuse_odd_grey(image: Image.Image, name: str) -> None:
    """Raises InputError for grey TIFFs that Pillow would show too dark or as their negative."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        bits, is_negative = image.tag_v2.get(BITS), image.tag_v2.get(PHOTOMETRIC) == 0
        if bits != (16,) or is_negative:
            odd = "with white as 0" if is_negative else f"of {' '.join(map(str, bits))} bits"
            raise InputError(f"{name}: a grey TIFF {odd}; save it in 8 bits, or in 16 with black as 0")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    grey = np.asarray(image, dtype=np.float32)
    if grey.max() < DARKEST:
        raise InputError(
            f"{name}: its 16-bit values reach {grey.max():.0f} of 65535, which is nearly black; if it holds 10, 12 or "
            "14 bits, stretch them to 16, or save it in 8 bits"
        )
    return Image.fromarray((grey / 257).clip(0, 255).astype(np.uint8))


def _is_heic(file: Path | BytesIO | None) -> bool:
    """Whether a file, of whatever name, begins as phones' HEIC does."""
    try:
        start = file.getvalue()[:12] if isinstance(file, BytesIO) else _start(file)
    except (OSError, TypeError):
        return False
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(12)
