"""Prompts and captions out of every kind of text file and table: read as what they say, or refused by name."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import pytest
from conftest import draw_photo

from finetuning import files
from finetuning.control.folder_source import read_folder
from finetuning.dataset.captions import caption_of, find_examples, read_prompt, read_prompts
from finetuning.dreambooth.prompts import read_templates
from finetuning.errors import InputError

MARK = b"\xef\xbb\xbf"  # of UTF-8
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def prompts_of(folder: Path) -> list[str]:
    return [example.prompt for example in find_examples(folder, "p", "--f")]


def metadata(folder: Path, *entries: dict | str, encoding: str = "utf-8") -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    (folder / "metadata.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


def captions_of(folder: Path) -> list[str]:
    """As the ControlNet trainer reads them."""
    source = read_folder(str(folder), flag="--train_data_dir", condition_column=None)
    return [caption for _, caption in source.captions(range(source.size))]


# Text files


def test_marks_and_line_ends_of_other_systems_are_no_part_of_the_text(photos):
    (photos / "0.txt").write_bytes(MARK + b"a red mug\r\n")
    (photos / "1.caption").write_bytes(MARK + b"a blue mug\r")
    assert prompts_of(photos) == ["a red mug", "a blue mug", "p"]
    (photos / "p.txt").write_bytes(MARK + b"a mug\r\n\r\n" + MARK + b"a dog\r\n")  # two files, joined
    assert read_prompts([str(photos / "p.txt")], "--p") == ["a mug", "a dog"]
    (photos / "t.txt").write_bytes(MARK + b"a {}\r\nthe {}\r")
    assert read_templates(str(photos / "t.txt")) == ["a {}", "the {}"]


@pytest.mark.parametrize("separator", "\u2028\u2029\u0085\x1c\x1d\x1e")
def test_only_newlines_end_lines(separator, photos):
    """JSON allows these in its strings (the last three as escapes, which are the same to a reader of text)."""
    text = f"a qwe mug{separator}on a table"
    raw = separator > "\x1f"
    entries = [{"file_name": f"{i}.png", "text": text} for i in range(3)]
    metadata(photos, *(entries if raw else map(json.dumps, entries)))
    assert prompts_of(photos) == [text] * 3 == captions_of(photos)
    (photos / "p.txt").write_text(f"a mug{separator}b\n", encoding="utf-8")
    assert read_prompts([str(photos / "p.txt")], "--p") == [f"a mug{separator}b"]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "shift-jis"])
def test_other_encodings_are_refused_everywhere(encoding, photos):
    text = {"shift-jis": "ソ", "utf-16-le": "a mug"}.get(encoding, COMPOSED)  # of which the latter is UTF-8 with NULs
    (photos / "p.txt").write_bytes(f"{text} {{}}\n".encode(encoding))
    for read in (read_prompts, read_templates, read_prompt):
        argument = str(photos / "p.txt") if read is not read_prompts else [str(photos / "p.txt")]
        with pytest.raises(InputError, match=r"--p=.*p\.txt: cannot be read \(.*save it as UTF-8"):
            read(argument, "--p")
    metadata(photos, {"file_name": "0.png", "text": text}, encoding=encoding)
    for read in (prompts_of, captions_of):
        with pytest.raises(InputError, match=r"metadata\.jsonl: .*save it as UTF-8"):
            read(photos)
    (photos / "metadata.jsonl").unlink()
    (photos / "0.txt").write_bytes(text.encode(encoding))
    for read in (prompts_of, captions_of):
        with pytest.raises(InputError, match=r"0\.txt: .*save it as UTF-8"):
            read(photos)


def test_what_is_written_is_read_again(tmp_path):
    files.write(tmp_path / "x", "a\n\nb \u2028 c\n")
    assert files.read(tmp_path / "x") == "a\n\nb \u2028 c\n"
    assert files.lines(tmp_path / "x") == [(1, "a"), (3, "b \u2028 c")]


# Prompts


def test_a_file_in_the_place_of_a_prompt_under_every_flag(tmp_path):
    for name in ("p.txt", "PROMPTS.TXT"):
        (tmp_path / name).write_text("a photo of qwe mug\n")
        assert read_prompts([str(tmp_path / name)], "--p") == ["a photo of qwe mug"]
        assert read_prompt(str(tmp_path / name), "--p") == "a photo of qwe mug"
    (tmp_path / "two.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"--p=.*two\.txt: holds 2 prompts"):
        read_prompt(str(tmp_path / "two.txt"), "--p")
    with pytest.raises(InputError, match=r"--p: 2 values, a \.txt file among them"):
        read_prompts(["a mug", str(tmp_path / "two.txt")], "--p")
    with pytest.raises(InputError, match=r"--p=.*: cannot be read \(File name too long\)"):
        read_prompt("x" * 5000 + ".txt", "--p")


# Captions beside images and in metadata.jsonl


def test_captions_of_both_endings_and_any_case(photos):
    (photos / "0.TXT").write_text("zero")
    (photos / "1.caption").write_text("one")
    (photos / "2.txt").write_text("two")
    (photos / "2.caption").write_text("two\n")
    assert prompts_of(photos) == ["zero", "one", "two"] == captions_of(photos)
    (photos / "2.caption").write_text("another")
    with pytest.raises(InputError, match=r"2\.caption and .*2\.txt: two captions of one image differ"):
        prompts_of(photos)


@pytest.mark.parametrize("forms", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_are_the_same_in_both_of_unicodes_forms(forms, tmp_path):
    on_disk, written = forms
    (tmp_path / on_disk).mkdir()
    draw_photo(0).save(tmp_path / f"{on_disk}.png")
    draw_photo(0).save(tmp_path / on_disk / f"{on_disk}.png")
    metadata(tmp_path, {"file_name": f"{written}.png", "text": "a", "map": f"{written}/{written}.png"})
    assert prompts_of(tmp_path) == ["a"]
    row = read_folder(str(tmp_path), flag="--f", condition_column="map").rows[0]
    assert (row.image.name, row.control) == (f"{on_disk}.png", tmp_path / on_disk / f"{on_disk}.png")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / f"{written}.txt").write_text("b")
    assert prompts_of(tmp_path) == ["b"]
    (tmp_path / "maps").mkdir()
    draw_photo(0).save(tmp_path / "maps" / f"{written}.png")
    paired = read_folder(str(tmp_path), flag="--f", controls_folder=str(tmp_path / "maps"))
    assert paired[0].condition.size == (24, 24) and paired[0].prompt == "b"


def test_a_name_in_one_form_does_not_take_what_is_of_the_other(tmp_path):
    """Where a file system keeps both apart."""
    for name in (COMPOSED, DECOMPOSED):
        draw_photo(0).save(tmp_path / f"{name}.png")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes them for one name")
    metadata(tmp_path, *({"file_name": f"{name}.png", "text": ascii(name)} for name in (COMPOSED, DECOMPOSED)))
    assert {e.path.stem: e.prompt for e in find_examples(tmp_path, "p", "--f")} == {
        COMPOSED: ascii(COMPOSED), DECOMPOSED: ascii(DECOMPOSED),
    }  # fmt: skip


NO_TEXT = [None, 5, 0, 1.5, True, {}, {"en": "a mug"}, [], [None], ["a", 5], [["a"]], float("nan")]


@pytest.mark.parametrize("value", NO_TEXT, ids=map(str, NO_TEXT))
def test_captions_that_are_no_text_are_refused(value, photos):
    metadata(photos, {"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": value})
    for read in (prompts_of, captions_of):
        with pytest.raises(InputError, match=r"metadata\.jsonl, line 2: the caption is .*no text; write a text"):
            read(photos)


def test_the_first_of_several_captions_and_none_at_all(photos, caplog):
    metadata(photos, {"file_name": "0.png", "text": ["first", "second"]}, {"file_name": "1.png", "text": ""})
    assert prompts_of(photos) == ["first", "p", "p"]
    with caplog.at_level(logging.WARNING):
        assert captions_of(photos) == ["first", ""]
    assert "1 of 2 images have no caption" in caplog.text


def test_half_a_character_is_refused(photos):
    with pytest.raises(InputError, match=r"x: the caption 'a\\ud83d' holds half a character"):
        caption_of("a\ud83d", "x")
    metadata(photos, '{"file_name": "0.png", "text": "a\\ud83d"}')
    with pytest.raises(InputError, match="half a character"):
        prompts_of(photos)


BROKEN = ["{}", "[]", "5", '"a"', "null", "{", '{"file_name": 5, "text": "a"}', '{"file_name": null, "text": "a"}',
          '{"file_name": ["0.png"], "text": "a"}', "[" * 100_000, '{"file_name": "0.png", "text": "a"} x']  # fmt: skip


@pytest.mark.parametrize("line", BROKEN, ids=[line[:20] for line in BROKEN])
def test_lines_that_are_no_objects_with_a_name_are_refused(line, photos):
    metadata(photos, '{"file_name": "0.png", "text": "a"}', "", line)
    for read in (prompts_of, captions_of):
        with pytest.raises(InputError, match=r"metadata\.jsonl, line 3: expected an object with file_name and text"):
            read(photos)


def test_a_file_named_twice_with_two_captions(photos):
    metadata(photos, *({"file_name": "0.png", "text": text} for text in "aa"))
    assert prompts_of(photos)[0] == "a"
    metadata(photos, *({"file_name": "0.png", "text": text} for text in "ab"))
    with pytest.raises(InputError, match=r"line 2: 0\.png has another caption in .*line 1"):
        prompts_of(photos)
    assert captions_of(photos) == ["a", "b"], "two samples of one image"


def test_metadata_that_cannot_be_opened(photos):
    (photos / "metadata.jsonl").mkdir()
    for read in (prompts_of, captions_of):
        with pytest.raises(InputError, match=r"metadata\.jsonl: cannot be read \(Is a directory\)"):
            read(photos)
    (photos / "metadata.jsonl").rmdir()
    (photos / "metadata.jsonl").symlink_to("nowhere")
    for read in (prompts_of, captions_of):
        with pytest.raises(InputError, match=r"metadata\.jsonl: cannot be read \(No such file"):
            read(photos)


@pytest.mark.parametrize("name", ["nowhere.png", "", "..", "a\0.png", "x" * 5000, 5, None, ["0.png"], {}])
def test_controls_that_are_no_files(name, photos):
    metadata(photos, {"file_name": "0.png", "text": "a", "map": name})
    with pytest.raises(InputError, match=r"metadata\.jsonl, line 1, map: .*(not there|no name of a file|cannot be)"):
        read_folder(str(photos), flag="--f", condition_column="map")


def test_two_controls_of_one_name(photos):
    maps = photos / "maps"
    maps.mkdir()
    for i in range(3):
        draw_photo(i).save(maps / f"{i}.png")
    draw_photo(0).save(maps / "1.jpg")
    with pytest.raises(InputError, match=r"--conditioning_data_dir=.*: 1\.jpg and 1\.png for 1\.png; keep one"):
        read_folder(str(photos), flag="--f", controls_folder=str(maps))
    (maps / "1.jpg").unlink()
    (maps / "._1.png").write_bytes(b"macOS puts such beside its files")
    assert read_folder(str(photos), flag="--f", controls_folder=str(maps)).size == 3
