"""Image files of every kind: read as what they show, or refused by name; never otherwise."""

from __future__ import annotations

import io
import logging
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image, features

from finetuning.control.hub_source import HubSource
from finetuning.control.sources import open_condition
from finetuning.dataset.images import find_images, open_image, verify_picture
from finetuning.errors import InputError

GREY = np.tile(np.linspace(0, 1, 32), (32, 1))


def exif(*tags: tuple[int, int, int, bytes], orientation: int | None = 6) -> bytes:
    """EXIF of raw tags (number, type, count, four bytes), and an orientation."""
    tags = (*tags, (0x0112, 3, 1, struct.pack("<HH", orientation, 0))) if orientation else tags
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(32)


ODD = {
    "a resolution of text": exif((0x011A, 2, 3, b"72\0\0")),
    "a resolution of floats": exif((0x011A, 11, 1, struct.pack("<f", 72))),
    "a rational of one byte": exif((0x011B, 1, 1, b"\6\0\0\0")),
    "a description of numbers": exif((0x010E, 3, 2, b"\1\0\2\0")),
    "a pointer that leads nowhere": exif((0x8769, 4, 1, struct.pack("<I", 1 << 30))),
    "a pointer of text": exif((0x8825, 2, 4, b"abc\0")),
    "an unknown type": exif((0x0131, 99, 1, b"\0\0\0\0")),
    "a count beyond the file": exif((0x010F, 2, 1 << 30, struct.pack("<I", 26))),
}


def quarters() -> Image.Image:
    """64×48, the left half black and the right half white: turned by 90° clockwise, white is below."""
    image = Image.new("RGB", (64, 48), "black")
    image.paste("white", (32, 0, 64, 48))
    return image


def hub_source(*files: bytes) -> HubSource:
    import datasets

    rows = {"image": [{"bytes": file, "path": None} for file in files], "text": ["a"] * len(files)}
    data = datasets.Dataset.from_dict({**rows, "control": rows["image"]})
    for column in ("image", "control"):
        data = data.cast_column(column, datasets.Image())
    return HubSource(data, "image", "control", "text")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("tags", ODD.values(), ids=ODD)
def test_odd_exif_does_not_keep_a_picture_from_being_turned(tags, ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    quarters().save(path, exif=tags, **({"quality": 95} if ending == "jpg" else {"lossless": True}))
    sample = hub_source(path.read_bytes())[0]
    for image in (open_image(path), open_condition(path), sample.image, sample.condition):
        assert image.size == (48, 64)
        pixels = np.asarray(image.convert("L"))
        assert pixels[:28].max() < 8 and pixels[36:].min() > 247


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow_and_turns_once(orientation, tmp_path):
    from PIL import ImageOps

    draw_photo(0, (20, 12)).save(tmp_path / "x.png", exif=exif(orientation=orientation))
    with Image.open(tmp_path / "x.png") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    control = open_condition(tmp_path / "x.png")
    for image in (open_image(tmp_path / "x.png"), control, ImageOps.exif_transpose(control)):
        assert np.array_equal(np.asarray(image), wanted)


def test_damaged_exif_says_nothing(tmp_path):
    for name, tags in {"a": b"Exif\0\0II*\0", "b": b"Exif\0\0no TIFF at all", "c": exif(orientation=77)}.items():
        quarters().save(tmp_path / f"{name}.jpg", exif=tags)
        assert open_image(tmp_path / f"{name}.jpg").size == (64, 48)


def tiff(bits: int, photometric: int, values: np.ndarray) -> bytes:
    """A grey TIFF of one strip, whose pixels are packed in so many bits."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").tobytes()
        data = b"".join(packed[i + 1 : i + 4] for i in range(0, len(packed), 4))
    else:
        data = values.astype("<u2").tobytes()
    shape = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    tags = [*shape, (273, 200), (277, 1), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", number, 4 if number in (273, 279) else 3, 1, v) for number, v in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    return head + bytes(200 - len(head)) + data


UNKNOWN = {
    "floats of 0 to 1": GREY.astype(np.float32),
    "floats of 0 to 255": (GREY * 255).astype(np.float32),
    "32-bit numbers": (GREY * 1e9).astype(np.int32),
    "10 bits in 16": (GREY * 1023).astype(np.uint16),
    "12 bits in 16": (GREY * 4095).astype(np.uint16),
    "14 bits in 16": (GREY * 16383).astype(np.uint16),
    "8 bits in 16": (GREY * 255).astype(np.uint16),
    "nothing in 16": np.zeros((32, 32), np.uint16),
}


@pytest.mark.parametrize("values", UNKNOWN.values(), ids=UNKNOWN)
def test_photos_of_unknown_range_are_refused(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: .*8 (or 16 )?bits"):
        open_image(tmp_path / "x.tif")


def test_grey_tiffs_that_pillow_shows_otherwise_are_refused(tmp_path):
    deep = (GREY * 65535).astype(np.uint16)
    files = {"of 12 bits": tiff(12, 1, (GREY * 4095).astype(np.uint16)), "with white as 0": tiff(16, 0, deep)}
    for words, data in files.items():
        (tmp_path / "x.tif").write_bytes(data)
        for read in (open_image, open_condition, lambda path: verify_picture(path, "x.tif")):
            with pytest.raises(InputError, match=rf"x\.tif: a grey TIFF {words}"):
                read(tmp_path / "x.tif")
    (tmp_path / "x.tif").write_bytes(tiff(16, 1, deep))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.tif"))[..., 0], (deep / 257).astype(np.uint8))


def test_16_bits_of_every_layout_show_what_8_bits_do(tmp_path):
    """Also with colours and transparency, which Pillow reads in 8 bits."""
    import zlib

    def png(colour_type: int, samples: np.ndarray) -> bytes:
        def chunk(name, data):
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
        header = struct.pack(">IIBBBBB", 32, 32, 16, colour_type, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        )

    grey, opaque = (GREY * 65535).astype(np.uint16)[..., None], np.full((32, 32, 1), 65535, np.uint16)
    layouts = {0: [grey], 2: [grey] * 3, 4: [grey, opaque], 6: [grey, grey, grey, opaque]}
    for colour_type, channels in layouts.items():
        (tmp_path / "x.png").write_bytes(png(colour_type, np.concatenate(channels, -1)))
        shown = np.asarray(open_image(tmp_path / "x.png")).astype(int)
        assert np.abs(shown - (GREY * 255)[..., None]).max() <= 1, colour_type


def test_a_palette_with_transparency_is_on_white(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 8, 16))
    for name in ("x.png", "x.gif"):
        image.save(tmp_path / name, transparency=0)
        pixels = np.asarray(open_image(tmp_path / name))
        assert (pixels[:, :8] == (0, 0, 255)).all() and (pixels[:, 8:] == 255).all()


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif", *(["avif"] if features.check("avif") else [])])
def test_a_file_of_several_pictures_is_refused(ending, tmp_path):
    first, second = draw_photo(0), draw_photo(1)
    first.save(tmp_path / f"x.{ending}", save_all=True, append_images=[second])
    for read in (open_image, open_condition):
        with pytest.raises(InputError, match=rf"x\.{ending}: holds 2 pictures"):
            read(tmp_path / f"x.{ending}")
    with pytest.raises(InputError, match=r"row 0.*column image: holds 2 pictures"):
        hub_source((tmp_path / f"x.{ending}").read_bytes())[0]
    first.save(tmp_path / f"x.{ending}")
    assert open_image(tmp_path / f"x.{ending}").size == first.size


def test_a_phones_second_picture_of_a_photo_is_no_other_photo(tmp_path):
    draw_photo(0).save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[draw_photo(1)])
    assert open_image(tmp_path / "x.jpg").size == (24, 24)


def test_endings_that_pillow_reads(tmp_path):
    names = ["0.jfif", "1.gif", "2.JPG", *(["3.avif"] if features.check("avif") else [])]
    for name in names:
        draw_photo(0).save(tmp_path / name, format={"jfif": "JPEG"}.get(name[2:]))
        assert open_image(tmp_path / name).size == (24, 24)
    assert [p.name for p in find_images(tmp_path, "--f")] == names


def test_heic_is_told_how_to_be_read_under_any_name(tmp_path, caplog):
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    (tmp_path / "0.heic").write_bytes(data)
    with pytest.raises(InputError, match=r"--f=.*holds no image.*convert it to JPEG.*sips"):
        find_images(tmp_path, "--f")
    (tmp_path / "1.jpg").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        find_images(tmp_path, "--f")
    assert "0.heic" in caplog.text and "convert it to JPEG" in caplog.text
    for read in (open_image, open_condition):
        with pytest.raises(InputError, match=r"1\.jpg: not a readable .*convert it to JPEG"):
            read(tmp_path / "1.jpg")
    with pytest.raises(InputError, match=r"row 0.*convert it to JPEG"):
        hub_source(data)[0]


def test_subfolders_with_images_are_named(photos, caplog):
    for name in ("inner", "empty", "x.png"):
        (photos / name).mkdir()
    draw_photo(0).save(photos / "inner" / "0.png")
    with caplog.at_level(logging.WARNING):
        assert len(find_images(photos, "--f")) == 3
    assert "subfolders are not searched for images: inner, x.png" in caplog.text
    for path in photos.glob("?.png"):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=r"holds no image.*only its subfolders inner do"):
        find_images(photos, "--f")


def test_names_of_any_digits_are_in_order(tmp_path):
    for name in ("1².png", "1.png", "²3.png", unicodedata.normalize("NFD", "é٣.png")):
        draw_photo(0).save(tmp_path / name)
    assert len(find_images(tmp_path, "--f")) == 4


def test_a_row_that_cannot_be_decoded_is_named():
    good = io.BytesIO()
    draw_photo(0).save(good, format="PNG")
    source = hub_source(good.getvalue(), good.getvalue()[:70], b"")
    assert source[0].image.size == (24, 24)
    for row in (1, 2):
        with pytest.raises(InputError, match=rf"row {row} \(from 0\) of split train, column image: not a readable"):
            source[row]


def test_a_header_is_enough_to_find_what_is_no_image(tmp_path):
    path = Path(tmp_path / "x.png")
    draw_photo(0, (30, 20)).save(path)
    assert verify_picture(path, "x") == (20, 30)
    for data in (b"", b"no image", path.read_bytes()[:-20]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="x: not a readable image"):
            verify_picture(path, "x")
