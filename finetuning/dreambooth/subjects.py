"""Subjects with photos and prompts: those that ship with the repository, and those of google/dreambooth."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from finetuning.dreambooth.prompts import LIVE
from finetuning.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = ROOT / "data" / "toyworld" / "subjects"
DREAMBOOTH = ROOT / "data" / "dreambooth"
URL = "https://github.com/google/dreambooth"
COMMIT = "4f887af"  # the version that is fetched
COUNTS = {"subjects": 30, "photos": 158}  # of a complete copy
SHOWN = 6  # prompts that are drawn on the way


@dataclass(frozen=True)
class TrainingSubject:
    """A subject to train on, and the prompts that go with it.

    Attributes:
        name: of the subject.
        instance_dir: folder of its photos.
        instance_prompt: names it by a rare token, e.g. "a photo of qwe mug".
        class_prompts: describe its class, for prior preservation.
        validation_prompts: what is drawn on the way.
        base_prompts: the same without the token, for the base model, which does not know it.
    """

    name: str
    instance_dir: Path
    instance_prompt: str
    class_prompts: list[str]
    validation_prompts: list[str]
    base_prompts: list[str]


def embedded_subject(name: str) -> TrainingSubject:
    """A subject that ships with the repository, as its subject.json describes it. An empty name means the first one.

    Raises:
        InputError: if there is no such subject.
    """
    names = sorted(p.parent.name for p in SUBJECTS.glob("*/subject.json"))
    if not names:
        raise InputError(f"{SUBJECTS}: holds no subject; is the repository complete?")
    if name and name not in names:
        raise InputError(f"SUBJECT={name}: no such embedded subject; there are: {', '.join(names)}")
    folder = SUBJECTS / (name or names[0])
    subject = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
    word, prompts = subject["class_word"], subject["validation_prompts"][:SHOWN]
    named = re.search(rf"\S+ {re.escape(word)}", subject["instance_prompt"])  # e.g. "qwe mug"
    if named is None:
        raise InputError(f"{folder}: instance_prompt does not name the class word {word!r} after a token")
    return TrainingSubject(
        name=subject["name"],
        instance_dir=folder,
        instance_prompt=subject["instance_prompt"],
        class_prompts=subject["class_prompts"],
        validation_prompts=prompts,
        base_prompts=[prompt.replace(named.group(), with_article(word)) for prompt in prompts],
    )


def dreambooth_subject(index: int, token: str) -> TrainingSubject:
    """A subject of google/dreambooth, with the prompts for its kind: objects or live subjects.

    Args:
        index: of the subject, 0 to 29, in alphabetical order.
        token: the rare word that names it.

    Raises:
        InputError: if there is no such subject, or the data set cannot be fetched.
    """
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
    # Half plain, half varied: plain ones alone tie their backgrounds to the class, varied ones alone let the subject
    # into the plain prompt.
    plain = f"a photo of {with_article(word)}"
    return TrainingSubject(
        name=name,
        instance_dir=folder / name,
        instance_prompt=f"a photo of {token} {word}",
        class_prompts=[prompt for t in templates[:10] for prompt in (plain, without_token(t).format(word))],
        validation_prompts=[template.format(token, word) for template in templates[:SHOWN]],
        base_prompts=[without_token(template).format(word) for template in templates[:SHOWN]],
    )


def with_article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def without_token(template: str) -> str:
    """A template of google/dreambooth, "a {0} {1} in the snow", with a place for the class word alone."""
    return template.replace("{0} {1}", "{0}")


def find_dreambooth() -> Path:
    """The data set's folder, which holds a folder for each subject; it is fetched if it is not there.

    The variable DREAMBOOTH_DIR names a copy that lies elsewhere.

    Raises:
        InputError: if the data set is incomplete, or cannot be fetched.
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
    """Fetch the pinned commit of the data set: beside its place, so that it appears there only when it is complete.

    Raises:
        InputError: if it cannot be fetched, or is not complete.
    """
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
    """Check that a folder holds all subjects and photos; `source` names it in messages.

    Raises:
        InputError: if something is missing.
    """
    if not (folder / "prompts_and_classes.txt").is_file():
        raise InputError(f"{source}: has no prompts_and_classes.txt; give the folder dataset/ of google/dreambooth")
    found = {
        "subjects": sum(p.is_dir() for p in folder.iterdir()),
        "photos": sum(1 for _ in folder.glob("*/*.jpg")),
    }
    if found != COUNTS:
        raise InputError(f"{source}: holds {found}, expected {COUNTS}; fetch it again")
