#!/usr/bin/env python
"""Find a subject and its prompts; print them, one `key<tab>value` a line.

    python scripts/prepare_dataset.py embedded [NAME]       of data/toyworld/subjects, by default the first
    python scripts/prepare_dataset.py dreambooth 27         of google/dreambooth, 0 … 29 in alphabetical order

The photos of google/dreambooth (107 MB; licences in its LICENSE.md) are looked for in $DREAMBOOTH_DIR and in
data/dreambooth/dataset, and otherwise fetched from GitHub at a pinned commit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.dreambooth.subjects import dreambooth_subject, embedded_subject
from finetuning.settings.fields import run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    embedded = kinds.add_parser("embedded")
    embedded.add_argument("name", nargs="?", default="")
    photos = kinds.add_parser("dreambooth")
    photos.add_argument("index", type=int)
    photos.add_argument("--token", default="qwe", help="the rare word that names the subject")
    options = parser.parse_args(argv)
    if options.kind == "embedded":
        subject = embedded_subject(options.name)
    else:
        subject = dreambooth_subject(options.index, options.token)
    lines = [(name, str(getattr(subject, name))) for name in ("name", "instance_dir", "instance_prompt")]
    lines += [("class_prompt", prompt) for prompt in subject.class_prompts]
    for prompt, base_prompt in zip(subject.validation_prompts, subject.base_prompts):
        lines += [("validation_prompt", prompt), ("base_prompt", base_prompt)]
    print("\n".join("\t".join(line) for line in lines))


if __name__ == "__main__":
    sys.exit(run_command(main))
