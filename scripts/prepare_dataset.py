#!/usr/bin/env python
"""Find a subject and its prompts, and print each of them as a line `key<tab>value`.

    python scripts/prepare_dataset.py embedded [NAME]       of data/toyworld/subjects, by default the first
    python scripts/prepare_dataset.py dreambooth 27         of google/dreambooth, 0 … 29 in alphabetical order

The photos of google/dreambooth (107 MB; licences in its LICENSE.md) are looked for in $DREAMBOOTH_DIR and in
data/dreambooth/dataset, and otherwise fetched from GitHub at a pinned commit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.dreambooth.subjects import dreambooth_subject, embedded_subject
from finetuning.settings.reading import read_config, run_command
from finetuning.settings.studies import SUBJECTS, DreamBoothSubjectConfig, EmbeddedSubjectConfig


def main(argv: Sequence[str] | None = None) -> None:
    config = read_config(SUBJECTS, argv, __doc__)
    if isinstance(config, EmbeddedSubjectConfig):
        subject = embedded_subject(config.subject.name)
    elif isinstance(config, DreamBoothSubjectConfig):
        subject = dreambooth_subject(config.subject.index, config.subject.token)
    lines = [(name, str(getattr(subject, name))) for name in ("name", "instance_dir", "instance_prompt")]
    lines += [("class_prompt", prompt) for prompt in subject.class_prompts]
    for prompt, base_prompt in zip(subject.validation_prompts, subject.base_prompts):
        lines += [("validation_prompt", prompt), ("base_prompt", base_prompt)]
    print("\n".join("\t".join(line) for line in lines))


if __name__ == "__main__":
    sys.exit(run_command(main))
