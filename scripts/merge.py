#!/usr/bin/env python

"""Put adapters into the weights of their base: a pipeline in diffusers' format that needs nothing of this project.

python scripts/merge.py --adapter data/output/dreambooth --output_dir data/output/merged
python scripts/merge.py --adapter runs/mug:0.8 runs/robot:0.6 --output_dir data/output/both --precision fp16
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.adapters.choice import AdapterChoice, load_chosen
from finetuning.errors import InputError
from finetuning.export.pipeline import save_pipeline
from finetuning.export.precision import DTYPES
from finetuning.settings.fields import Config, Group, read_config, run_command, setting
from finetuning.settings.folders import check_writable


@dataclass
class MergeSettings(Group):
    """Result"""

    output_dir: str | None = setting(None, "Folder of the merged pipeline; empty or not there yet.")
    precision: str = setting("fp32", "Of the stored weights.", choices=tuple(DTYPES))

    def faults(self) -> Iterator[str]:
        if self.output_dir is None:
            yield "--output_dir: needed, the folder of the merged pipeline"


@dataclass
class MergeConfig(Config):
    """Everything that merge.py can be told."""

    result: MergeSettings
    adapters: AdapterChoice

    def faults(self) -> Iterator[str]:
        if not self.adapters.adapter:
            yield "--adapter: needed, the folder of a run"


def main(argv: Sequence[str] | None = None) -> None:
    config = read_config(MergeConfig, argv, __doc__)
    folder = Path(config.result.output_dir)
    check_writable(folder, "--output_dir")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output_dir={folder}: is not empty; give a new folder")
    pipeline, strengths = load_chosen(config.adapters)
    lost = save_pipeline(pipeline, folder, config.result.precision)
    print(f"{folder}: {' and '.join(f'{name} at {s:g}' for name, s in strengths.items())} in {pipeline.name_or_path}")
    print("\n".join(f"lost: {text}" for text in lost))


if __name__ == "__main__":
    sys.exit(run_command(main))
