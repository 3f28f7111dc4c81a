"""Image files: finding them in a folder, and reading them as upright 8-bit RGB."""

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
from PIL.TiffImagePlugin import TiffImageFile

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
COMPANIONS = ("subject.json", "metadata.jsonl", "record.json")  # expected beside images, so no warning names them
SMALLEST_SIDE = 8  # pixels
SEQUENCES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # may hold several pictures; MPO's others show the same photo again
ORIENTATION = 0x0112  # EXIF's tag for it
SHORT = 3  # EXIF's number for the type of its value
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
ROTATIONS = {  # EXIF's orientation: what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_PLACES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow finds an orientation
DARKEST = 16384  # the least maximum of a 16-bit image: a quarter of the range, which images of 14 bits stay below


# Folders


def find_images(folder: str | Path, flag: str) -> list[Path]:
    """Find the image files of a folder, in the order of their names, in which numbers count as numbers (2 before 10).

    Other files, and subfolders that hold images, are skipped with a warning that names them.

    Args:
        flag: the flag that gave the folder; errors name it.

    Raises:
        InputError: if there is no such folder, or no image in it.
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
    """Whether a path has the suffix of an image, is not hidden, and is a file or a broken link.

    Broken links count, so that reading them fails with an error instead of their being skipped. Pipes and devices do
    not: opening one may block forever.
    """
    is_named = path.suffix.lower() in suffixes and not path.name.startswith(".")
    return is_named and (path.is_file() or not path.exists())


def composed(name: str) -> str:
    """A file name in Unicode's composed form (NFC), so that é as one character equals é as e and an accent."""
    return unicodedata.normalize("NFC", name)


def _holds_images(folder: Path) -> bool:
    try:
        return any(is_image_file(p) for p in folder.iterdir())
    except OSError:
        return False


def _natural(path: Path) -> list[int | str]:
    """A key that sorts file names with the numbers in them as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


# Pictures


def open_image(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB: turned as its EXIF says, transparency on white, 16-bit grey scaled down.

    Raises:
        InputError: if the file is corrupt or truncated, holds several pictures, is too small or too large, or has
            values of an unknown range; the error names the file.
    """
    return to_rgb(read_picture(path, str(path)), str(path))


def read_picture(file: Path | BytesIO, name: str, kind: str = "image") -> Image.Image:
    """Read the picture of a file in the mode in which it was saved, turned as its EXIF says.

    Args:
        file: the file, or its bytes.
        name: what an error calls the file.
        kind: what an error says that the file should be.

    Raises:
        InputError: if the file is corrupt or truncated, too large, or holds several pictures.
    """
    with naming(name, kind, file), Image.open(file) as image:
        refuse_sequence(image, name)
        _refuse_odd_grey(image, name)
        image.load()
        return upright(image)


def verify_picture(file: Path | BytesIO, name: str, kind: str = "image") -> tuple[int, int]:
    """Check a picture without decoding its pixels. The arguments are those of `read_picture`.

    Returns:
        Its two sides in pixels, the shorter one first.

    Raises:
        InputError: if the file is no image or holds several, or if Pillow finds it damaged without decoding it.
    """
    with naming(name, kind, file), Image.open(file) as image:
        refuse_sequence(image, name)
        _refuse_odd_grey(image, name)
        image.verify()
        return min(image.size), max(image.size)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an open, upright image to 8-bit RGB.

    Args:
        name: what an error calls the file.

    Raises:
        InputError: if the image is too small, its values have an unknown range, or its colours cannot be converted.
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
    """A copy of an image, turned as its EXIF says."""
    orientation = _orientation(image)
    turn = ROTATIONS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image.copy()
    turned = image.transpose(turn)
    for place in EXIF_PLACES:  # a later reader of the orientation would turn it again
        turned.info.pop(place, None)
    return turned


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """What `open_image` returns, for an image that is already open. name: what an error calls the file."""
    return to_rgb(upright(image), name)


def refuse_sequence(image: Image.Image, name: str) -> None:
    """Raises InputError if a file holds several pictures, as animations and files with pages do."""
    count = getattr(image, "n_frames", 1) if image.format in SEQUENCES else 1
    if count > 1:
        raise InputError(f"{name}: holds {count} pictures; save the one that it is about as a file of its own")


@contextmanager
def naming(name: str, kind: str = "image", file: Path | BytesIO | None = None) -> Iterator[None]:
    """Turns any error of decoding into an InputError that names the file: on damaged files, decoders raise anything.

    Args:
        name: what the error calls the file.
        kind: what the error says that the file should be.
        file: the file or its bytes, to tell whether it is HEIC under another name.
    """
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
    """EXIF's orientation, 1 to 8, or something else where none is known.

    EXIF is searched here first, because Pillow reads none of its entries behind a damaged one.
    """
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
    except Exception:  # EXIF that cannot be read is ignored, as viewers of pictures ignore it
        return None


def _refuse_odd_grey(image: Image.Image, name: str) -> None:
    """Raises InputError for grey TIFFs that Pillow would show too dark or as their negative."""
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        bits, is_negative = image.tag_v2.get(BITS, ()), image.tag_v2.get(PHOTOMETRIC) == 0
        if bits != (16,) or is_negative:
            odd = "with white as 0" if is_negative else f"of {' '.join(map(str, bits))} bits"
            raise InputError(f"{name}: a grey TIFF {odd}; save it in 8 bits, or in 16 with black as 0")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """A 16-bit grey image in 8 bits; InputError if it is nearly black, which tells that it has fewer bits."""
    grey = np.asarray(image, dtype=np.float32)
    if grey.max() < DARKEST:
        raise InputError(
            f"{name}: its 16-bit values reach {grey.max():.0f} of 65535, which is nearly black; if it holds 10, 12 or "
            "14 bits, stretch them to 16, or save it in 8 bits"
        )
    return Image.fromarray((grey / 257).clip(0, 255).astype(np.uint8))


def _is_heic(file: Path | BytesIO | None) -> bool:
    """Whether a file begins as HEIC does, the format of phones, whatever its name is."""
    if file is None:
        return False
    try:
        start = file.getvalue()[:12] if isinstance(file, BytesIO) else _start(file)
    except OSError:
        return False
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(12)
