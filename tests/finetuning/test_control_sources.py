"""Controls, captions and rows that are not what they should be: found before training, and named."""

from __future__ import annotations

import io
import logging
import os

import numpy as np
import pytest
import torch
from conftest import draw_photo
from control_training import control_folder
from PIL import Image

from finetuning.control.conditions import read_bands, stack, to_condition
from finetuning.control.folder_source import read_folder
from finetuning.control.hub_source import HubSource, read_split
from finetuning.control.sources import open_condition, verify_condition
from finetuning.control.stream import ControlBatches, ControlStream
from finetuning.dataset.transform import Transform
from finetuning.errors import InputError

KNOWN = {
    "bool": (np.array([[False, True]]), [0, 1]),
    "uint8": (np.array([[0, 255]], np.uint8), [0, 1]),
    "uint16": (np.array([[0, 257, 65535]], np.uint16), [0, 1 / 255, 1]),
    "big-endian uint16": (np.array([[0, 65535]], ">u2"), [0, 1]),
    "float16": (np.array([[0, 0.5, 1]], np.float16), [0, 0.5, 1]),
    "float32": (np.array([[0, 0.5, 1]], np.float32), [0, 0.5, 1]),
    "float64": (np.array([[0, 0.5, 1]]), [0, 0.5, 1]),
}
UNKNOWN = {
    "int32": (np.full((4, 4), 300, np.int32), "int32 from 300 to 300"),
    "int64": (np.full((4, 4), 1), "int64 from 1 to 1"),
    "int8": (np.full((4, 4), -3, np.int8), "int8 from -3 to -3"),
    "int16": (np.full((4, 4), 7, np.int16), "int16 from 7 to 7"),
    "uint32": (np.full((4, 4), 7, np.uint32), "uint32 from 7 to 7"),
    "negative": (np.full((4, 4), -0.1), "from -0.1 to -0.1"),
    "too large": (np.full((4, 4), 1.5, np.float16), "from 1.5 to 1.5"),
    "NaN": (np.array([[0.5, np.nan]]), "not finite"),
    "inf": (np.array([[0.5, np.inf]], np.float32), "not finite"),
    "empty": (np.zeros((0, 4)), r"\(0, 4\)"),
    "no channels": (np.zeros((4, 4, 0)), r"\(4, 4, 0\)"),
    "one axis": (np.zeros(4), r"\(4,\)"),
    "four axes": (np.zeros((1, 4, 4, 3)), r"\(1, 4, 4, 3\)"),
    "a number": (np.float32(1), r"\(\)"),
    "complex": (np.zeros((4, 4), complex), "complex128"),
    "text": (np.full((4, 4), "a"), "<U1"),
    "dates": (np.zeros((4, 4), "datetime64[s]"), "datetime64"),
    "records": (np.zeros((4, 4), [("a", "u1")]), "give"),
}


@pytest.mark.parametrize(("values", "wanted"), KNOWN.values(), ids=KNOWN)
def test_arrays_of_known_range(values, wanted, tmp_path):
    np.save(tmp_path / "x.npy", values)
    condition = stack(read_bands(open_condition(tmp_path / "x.npy"), 1, "x"))
    torch.testing.assert_close(condition, torch.tensor([[wanted]], dtype=torch.float32), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("values", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_arrays_of_unknown_range_or_shape_are_refused(values, words, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, values)
    with pytest.raises(InputError, match=rf"x\.npy: .*{words}"):
        read_bands(open_condition(path), 1, str(path))


def test_controls_stay_in_their_range_when_they_are_resized():
    """As those of bytes do, which are clipped: smooth resizing goes beyond black and white at their edge."""
    edge = np.zeros((24, 24), np.uint8)
    edge[:, 11:] = 255
    resize = Transform(16, center_crop=True)
    by_bytes, by_numbers = (to_condition(read_bands(e, 1, "x"), resize, 0) for e in (edge, edge / 255))
    assert by_numbers.min() == 0 and by_numbers.max() == 1
    torch.testing.assert_close(by_numbers, by_bytes, atol=1 / 255, rtol=0)


def test_files_that_are_no_arrays(tmp_path):
    path, whole = tmp_path / "x.npy", io.BytesIO()
    np.save(whole, np.zeros((8, 8)))
    huge = whole.getvalue().replace(b"(8, 8)", b"(999999999, 9)", 1)
    archive, pickled = io.BytesIO(), io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    np.save(pickled, np.array([{}, None]), allow_pickle=True)
    for data in (b"", b"no array", whole.getvalue()[:-9], huge, archive.getvalue(), pickled.getvalue()):
        path.write_bytes(data)
        for read in (open_condition, verify_condition):
            with pytest.raises(InputError, match=r"x\.npy: not a readable control \(.+\); replace or remove it"):
                read(path)


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 4, 3)])
def test_the_header_of_an_array_tells_that_it_is_no_picture(shape, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(shape))
    with pytest.raises(InputError, match=r"x\.npy: not a readable control \(an array .* give \(H, W\)"):
        verify_condition(tmp_path / "x.npy")


def test_photos_and_controls_of_32_bits_are_refused_alike():
    for image in (Image.new("F", (16, 16), 0.5), Image.new("I", (16, 16), 70_000)):
        with pytest.raises(InputError, match=r"x: mode .* no known range; save it in 8 or 16 bits"):
            read_bands(image, 1, "x")


# Streams


def make_stream(source, **options) -> ControlStream:
    return ControlStream("train", source, Transform(16), 0, **options)


def folder_stream(folder, **options) -> ControlStream:
    return make_stream(read_folder(str(folder), flag="--train_data_dir"), **options)


def test_a_fault_of_the_last_of_many_samples_is_found_before_training(tmp_path):
    folder = control_folder(tmp_path / "data", 600, (8, 8))
    os.truncate(folder / "599.png", 60)
    os.truncate(folder / "controls" / "550.png", 60)
    stream = folder_stream(folder)
    for pixels in (1e9, 64 * 100):  # read in full; from the 101st on by their headers
        with pytest.raises(InputError) as caught:
            stream.check(100, pixels)
        assert [fault.split(": ")[0] for fault in caught.value.faults] == [
            str(folder / "controls" / "550.png"), str(folder / "599.png"),
        ]  # fmt: skip


def test_what_was_only_looked_at_is_said(tmp_path, caplog):
    folder = control_folder(tmp_path / "data", 10, (8, 8))
    draw_photo(0, (8, 9)).save(folder / "controls" / "9.png")
    with pytest.raises(InputError, match=r"9\.png: the image has 8×8 pixels, its control .*controls/9\.png 8×9"):
        folder_stream(folder).check(2, 64 * 4)
    draw_photo(0, (8, 8)).save(folder / "controls" / "9.png")
    with caplog.at_level(logging.INFO):
        folder_stream(folder).check()
        assert not caplog.text
        folder_stream(folder).check(2, 64 * 4)
    assert "of 10 samples 4 were read before training, of the other 6 only the headers" in caplog.text


def test_many_faults_are_counted(tmp_path):
    folder = control_folder(tmp_path / "data", 30, (8, 8))
    for i in range(25):
        os.truncate(folder / f"{i}.png", 0)
    with pytest.raises(InputError) as caught:
        folder_stream(folder).check()
    assert len(caught.value.faults) == 21 and caught.value.faults[-1] == "and 5 more"


def test_a_control_that_is_made_is_made_once_for_the_check(tmp_path):
    made = []

    def make(image):
        made.append(image)
        return image

    source = read_folder(str(control_folder(tmp_path / "data", 5)), flag="--train_data_dir", condition_column=None)
    make_stream(source, make=make).check()
    assert len(made) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_control_that_vanishes_is_one_line_out_of_a_worker_too(workers, tmp_path):
    folder = control_folder(tmp_path / "data", 3)
    stream = folder_stream(folder)
    stream.check()
    (folder / "controls" / "1.png").unlink()
    with pytest.raises(InputError) as caught:
        list(ControlBatches([stream], 3).load(range(1), workers))
    message = str(caught.value)
    assert message.startswith(f"{folder / 'controls' / '1.png'}: not a readable control") and "\n" not in message


# Tables


def table(**columns) -> HubSource:
    import datasets

    files = [{"bytes": png(draw_photo(i)), "path": None} for i in range(3)]
    rows = {"image": files, "map": files, "text": list("abc"), **columns}
    data = datasets.Dataset.from_dict({name: rows[name] for name in ("image", "map", "text")})
    for column in ("image", "map"):
        if rows[column][0] == files[0]:
            data = data.cast_column(column, datasets.Image())
    names = {"image": "image", "condition": "map", "caption": "text"}
    return read_split({"train": data}, "train", flag="--train_split", **names)


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def test_pixels_are_those_of_the_files():
    source = table()
    for i in range(3):
        assert np.array_equal(np.asarray(source[i].image), np.asarray(draw_photo(i)))
        assert np.array_equal(np.asarray(source[i].condition), np.asarray(draw_photo(i)))
        source.verify(i)
    assert source.captions([2, 0]) == [
        ("row 2 (from 0) of split train, --caption_column=text", "c"),
        ("row 0 (from 0) of split train, --caption_column=text", "a"),
    ]


@pytest.mark.parametrize("values", [["0.png"] * 3, [{"a": 1}] * 3, [5] * 3, [None] * 3, [[]] * 3], ids=str)
def test_control_columns_that_are_neither_images_nor_arrays(values):
    with pytest.raises(InputError) as caught:
        make_stream(table(map=values)).check()
    message = caught.value.faults[0]
    for words in ("row 0 (from 0) of split train, column map", "--conditioning_image_column", "map_file_name"):
        assert words in message
    assert "0.png" not in values[:1] or "str '0.png'" in message


@pytest.mark.parametrize("values", [[None, "b", "c"], ["a", None, "c"], [5, 6, 7], [["a"], [], ["c"]]], ids=str)
def test_captions_of_tables_that_are_no_text(values):
    row = next(i for i, value in enumerate(values) if not value or isinstance(value, int))
    with pytest.raises(InputError, match=rf"row {row} \(from 0\).*--caption_column=text: the caption is .*no text"):
        make_stream(table(text=values)).captions()


def test_labels_are_no_captions():
    import datasets

    source = table(text=[0, 1, 0])
    data = source.data.cast_column("text", datasets.ClassLabel(names=["mug", "dog"]))
    with pytest.raises(InputError, match="the caption is 0, which is no text"):
        HubSource(data, "image", "map", "text").captions([0])


def test_arrays_of_tables_have_the_type_of_their_column():
    import datasets

    maps = np.random.default_rng(0).integers(0, 256, (3, 24, 24), dtype=np.uint8)
    plain = table(map=[value.tolist() for value in maps])
    with pytest.raises(InputError, match=r"row 0 .*column map: int64 from \d+ to \d+, whose full range is unknown"):
        make_stream(plain).check()
    for feature in (datasets.Array2D((24, 24), "uint8"), datasets.List(datasets.List(datasets.Value("uint8")))):
        source = HubSource(plain.data.cast_column("map", feature), "image", "map", "text")
        (band,) = read_bands(source[1].condition, 1, "x")
        assert np.array_equal(np.asarray(band), maps[1])
