"""The prompts of DreamBooth's evaluation (arXiv 2208.12242), and how a prompt names its subject.

The lists are those of google/dreambooth, dataset/prompts_and_classes.txt (CC-BY 4.0); {} stands for the subject.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetuning import files
from finetuning.errors import InputError

LIVE = ("cat", "dog")  # classes that wear things
_PLACES = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
_PROPERTIES = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
OBJECT_PROMPTS = (
    *_PLACES,
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
    *_PROPERTIES,
)
LIVE_PROMPTS = (
    *_PLACES,
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
    *_PROPERTIES,
)
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class SubjectPhrase:
    """How prompts name the subject: by a rare token before the word of its class, e.g. "qwe mug"."""

    token: str
    class_word: str

    def templates(self) -> tuple[str, ...]:
        """The 25 prompts that the paper asks of this class, with {} for the subject."""
        return LIVE_PROMPTS if self.class_word in LIVE else OBJECT_PROMPTS

    def with_token(self, template: str) -> str:
        """The prompt that asks for the subject: "a {} in the snow" to "a qwe mug in the snow"."""
        return template.format(f"{self.token} {self.class_word}")

    def without_token(self, template: str) -> str:
        """The prompt that names the class alone, for CLIP, which does not know the token: "a mug in the snow".

        An article is added where the token stood in its place ("a photo of {}" to "a photo of a mug"), and "a" becomes
        "an" where the class word needs it.
        """
        text = template.format(self.class_word)
        start = template.index("{")
        before = template[:start].split()
        article = "an" if self.class_word[0] in "aeiou" else "a"
        if not before or before[-1] in ("of", "with", "and"):
            return f"{template[:start]}{article} {text[start:]}"
        if before[-1] in ("a", "an"):
            return re.sub(r"\ban? $", f"{article} ", text[:start]) + text[start:]
        return text

    def template(self, prompt: str) -> str:
        """The template of a prompt that names the subject: "a photo of qwe mug" to "a photo of {}".

        Raises:
            ValueError: if the prompt does not name the subject.
        """
        named = f"{self.token} {self.class_word}"
        if named not in prompt:
            raise ValueError(f"{prompt!r} does not name {named!r}")
        return prompt.replace("{", "{{").replace("}", "}}").replace(named, "{}", 1)


def find_subject_phrase(
    instance_prompt: str, class_prompts: Sequence[str] = (), class_word: str | None = None
) -> SubjectPhrase:
    """Find the token and the class word of a run in its prompts.

    Args:
        instance_prompt: e.g. "a photo of qwe stuffed animal".
        class_prompts: the class word is taken to be the words in which both the first of these and the instance prompt
            end.
        class_word: the class word where it is known; the class prompts are then not looked at.

    Raises:
        InputError: if the class word cannot be found; the message asks for --class_word.
    """
    said = instance_prompt.split()
    if class_word is None:
        other, common = class_prompts[0].split() if class_prompts else [], list[str]()
        while len(common) < min(len(said), len(other)) and said[-1 - len(common)] == other[-1 - len(common)]:
            common.insert(0, said[-1 - len(common)])
        class_word = " ".join(common)
    words = class_word.split()
    places = [i for i in range(len(said)) if words and said[i : i + len(words)] == words]
    if not places or places[0] == 0 or said[places[0] - 1] in _ARTICLES:
        found = f"--class_word={class_word}" if class_word else "--class_word: needed"
        raise InputError(
            f"{found}: --instance_prompt={instance_prompt!r} does not end in a rare word and the word of the class; "
            "give --class_word, the word after the rare one, e.g. --class_word=mug for 'a photo of qwe mug'"
        )
    return SubjectPhrase(token=said[places[0] - 1], class_word=class_word)


def read_templates(path: str, flag: str = "--prompts") -> list[str]:
    """The lines of a file of templates, each with one {} where the subject is named.

    Raises:
        InputError: if the file cannot be read or is empty, or a line does not hold exactly one {}.
    """
    try:
        lines = files.lines(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}={path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not lines:
        raise InputError(f"{flag}={path}: holds no prompt; write one a line, e.g. a {{}} in the snow")
    for number, line in lines:
        if line.count("{}") != 1 or line.count("{") != 1:
            raise InputError(
                f"{flag}={path}, line {number}: {line!r} must have one {{}} where the subject stands, "
                "e.g. a {} in the snow"
            )
    return [line for _, line in lines]
