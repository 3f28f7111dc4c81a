#!/usr/bin/env python

"""Put adapters into the weights of their base: a pipeline in diffusers' format that needs nothing of this project.

python scripts/merge.py --adapter data/output/dreambooth --output_dir data/output/merged
python scripts/merge.py --adapter runs/mug:0.8 runs/robot:0.6 --output_dir data/output/both --precision fp16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.inference import MergeConfig
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(MergeConfig, __doc__)  # before the slow imports

from finetuning.adapters.choice import load_chosen
from finetuning.errors import InputError
from finetuning.export.pipeline import save_pipeline
from finetuning.settings.folders import check_writable


def main(argv: Sequence[str] | None = None) -> None:
    merge(read_config(MergeConfig, argv, __doc__))


def merge(config: MergeConfig) -> None:
    """Load the base with the chosen adapters, merge them, and write the pipeline."""
    folder = Path(config.result.output_dir)
    check_writable(folder, "--output_dir")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output_dir={folder}: is not empty; give a new folder")
    pipeline, strengths = load_chosen(config.adapters)
    lost = save_pipeline(pipeline, folder, config.result.precision)
    print(f"{folder}: {' and '.join(f'{name} at {s:g}' for name, s in strengths.items())} in {pipeline.name_or_path}")
    print("\n".join(f"lost: {text}" for text in lost))


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: merge(config)))
