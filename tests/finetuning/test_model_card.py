"""The licence that a base's own card names, whatever others have written there."""

from __future__ import annotations

import pytest

from finetuning.publishing.model_card import licence_of, model_card

CARDS = {
    b"---\nlicense: mit\n---\n# A": "mit",
    b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n": "mit",
    b"---\ntags: [a]\nlicense: openrail++\n---": "openrail++",
    b"---\nlicense: apache-2.0\t\n---\n": None,
    b"---\n- license\n---\n": None,
    b"---\nlicense\n---\n": None,
    b"---\nlicense: [a, b]\n---\n": None,
    b"---\nlicense: 2020-13-45\n---\n": None,
    b"---\nlicense: caf\xe9\n---\n": None,
    "---\nlicense: mit\n---\n".encode("utf-16"): None,
    b"---\n\x00\n---\n": None,
    b"---\n" + b"[" * 1200 + b"\n---\n": None,
    b"---\n---\n": None,
    b"# no front matter": None,
    b"": None,
}


@pytest.mark.parametrize(("content", "licence"), CARDS.items(), ids=range(len(CARDS)))
def test_the_licence_of_a_base(content, licence, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    assert licence_of(str(tmp_path)) == licence
    card = model_card(title="t", base=str(tmp_path), kind="boft", folder="run", prompt="a photo of qwe mug", facts={})
    assert (f"license: {licence}" in card) if licence else "go on to this" in card


def test_a_card_that_is_a_folder_or_not_there(tmp_path):
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").mkdir()
    assert licence_of(str(tmp_path)) is None
