"""Subjects with photos and prompts: those that ship with the repository, and those of google/dreambooth."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from finetuning.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = ROOT / "data" / "toyworld" / "subjects"
DREAMBOOTH = ROOT / "data" / "dreambooth"
URL = "https://github.com/google/dreambooth"
COMMIT = "4f887af"
COUNTS = {"subjects": 30, "photos": 158}
LIVE = ("cat", "dog")
SHOWN = 6  # validation prompts


def embedded_subject(name: str) -> Iterator[tuple[str, str]]:
    """A subject that ships with the repository, as its subject.json describes it."""
    names = sorted(p.parent.name for p in SUBJECTS.glob("*/subject.json"))
    if not names:
        raise InputError(f"{SUBJECTS}: holds no subject; is the repository complete?")
    if name and name not in names:
        raise InputError(f"SUBJECT={name}: no such embedded subject; there are: {', '.join(names)}")
    folder = SUBJECTS / (name or names[0])
    subject = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
    yield "name", subject["name"]
    yield "instance_dir", str(folder)
    yield "instance_prompt", subject["instance_prompt"]
    yield from (("class_prompt", prompt) for prompt in subject["class_prompts"])
    word = subject["class_word"]
    called = re.search(rf"\S+ {re.escape(word)}", subject["instance_prompt"]).group()  # e.g. "qwe mug"
    for prompt in subject["validation_prompts"][:SHOWN]:
        yield "validation_prompt", prompt
        yield "base_prompt", prompt.replace(called, with_article(word))


def dreambooth_subject(index: int, token: str) -> Iterator[tuple[str, str]]:
    """A subject of google/dreambooth, with the prompts for its kind: objects or live subjects."""
    folder = find_dreambooth()
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not 0 <= index < len(names):
        raise InputError(f"index {index}: google/dreambooth has the subjects 0 to {len(names) - 1}")
    text = (folder / "prompts_and_classes.txt").read_text(encoding="utf-8")
    classes = dict(line.split(",") for line in text.split("Prompts")[0].splitlines() if "," in line)
    name, word = names[index], classes[names[index]]
    object_prompts, live_prompts = (
        re.findall(r"'(.*?)'\.format", part) for part in text.split("Object Prompts")[1].split("Live Subject Prompts")
    )
    templates = live_prompts if word in LIVE else object_prompts
    yield "name", name
    yield "instance_dir", str(folder / name)
    yield "instance_prompt", f"a photo of {token} {word}"
    for template in templates[:SHOWN]:
        yield "validation_prompt", template.format(token, word)
        yield "base_prompt", without_token(template).format(word)
    # Half plain, half varied: plain ones alone tie their backgrounds to the class, varied ones alone let the subject
    # into the plain prompt.
    for template in templates[:10]:
        yield "class_prompt", f"a photo of {with_article(word)}"
        yield "class_prompt", without_token(template).format(word)


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def without_token(template: str) -> str:
    return template.replace("{0} {1}", "{0}")


def find_dreambooth() -> Path:
    """The data set's folder with one folder a subject, fetched if need be.

    Raises:
        InputError: it is incomplete, or cannot be fetched.
    """
    given = os.environ.get("DREAMBOOTH_DIR")
    if given:
        check_counts(Path(given), f"DREAMBOOTH_DIR={given}")
        return Path(given)
    folder = DREAMBOOTH / "dataset"
    if not folder.is_dir():
        fetch()
    check_counts(folder, str(folder))
    return folder


def fetch() -> None:
    """Fetch the pinned commit beside its place, check it, and move it there."""
    print(f"fetching {URL} at {COMMIT} (107 MB)", file=sys.stderr)
    unfinished = DREAMBOOTH.with_name(".dreambooth")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for command in (
            ["git", "clone", "--quiet", "--no-checkout", "--filter=blob:none", URL, str(unfinished)],
            ["git", "-C", str(unfinished), "checkout", "--quiet", COMMIT],
        ):
            subprocess.run(
                command, check=True, stdin=subprocess.DEVNULL, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}
            )
        check_counts(unfinished / "dataset", URL)
        unfinished.rename(DREAMBOOTH)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"{URL} could not be fetched ({error}); check the network, or set DREAMBOOTH_DIR to a copy of its dataset/"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_counts(folder: Path, source: str) -> None:
    """Raises InputError unless the folder holds all subjects and photos."""
    if not (folder / "prompts_and_classes.txt").is_file():
        raise InputError(f"{source}: has no prompts_and_classes.txt; give the folder dataset/ of google/dreambooth")
    found = {
        "subjects": sum(p.is_dir() for p in folder.iterdir()),
        "photos": sum(1 for _ in folder.glob("*/*.jpg")),
    }
    if found != COUNTS:
        raise InputError(f"{source}: holds {found}, expected {COUNTS}; fetch it again")
