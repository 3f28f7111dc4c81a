#!/usr/bin/env python

"""Write what was trained in the formats of other programs, and say what each of them cannot hold.

    python scripts/export.py --format single-file --adapter data/output/dreambooth --output mug.safetensors
    python scripts/export.py --format lora --adapter data/output/dreambooth --output mug-lora.safetensors --rank auto
    python scripts/export.py --format peft --adapter data/output/dreambooth:0.8 --output mug-for-peft

single-file: one checkpoint in the original layout of Stable Diffusion 1.x or 2.x (`from_single_file`, web interfaces);
lora: kohya's names (`load_lora_weights`, web interfaces): a LoRA as it is; of BOFT the closest LoRA, which takes far
higher ranks than LoRA is trained with, for a rotation is not of low rank; peft: a folder for stock peft.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.adapters.choice import AdapterChoice, load_chosen
from finetuning.adapters.pipelines import mix_adapters
from finetuning.errors import InputError
from finetuning.export.formats import DTYPES, Truncation, how_to_load, save_for_peft, save_lora, save_single_file
from finetuning.settings.fields import Config, Group, read_config, run_command, setting
from finetuning.settings.folders import check_writable

FORMATS = ("single-file", "lora", "peft")


@dataclass
class ExportSettings(Group):
    """Result"""

    format: str | None = setting(None, "What to write.", choices=FORMATS)
    output: str | None = setting(None, "The file (single-file and lora: .safetensors) or the folder (peft).")
    rank: str = setting("auto", "lora: rank of every layer, or auto = the smallest that keeps --energy of it.")
    energy: float | None = setting(
        None,
        "lora: share of a layer's squared change that auto keeps. None = 0.95, and all of a LoRA.",
        above=0,
        maximum=1,
    )
    precision: str = setting(
        "fp32", "Of the stored numbers; an adapter for peft is always fp32.", choices=tuple(DTYPES)
    )
    mix: bool = setting(False, "Combine several adapters into one first, by their strengths.")

    def faults(self) -> Iterator[str]:
        for name in ("format", "output"):
            if getattr(self, name) is None:
                yield f"--{name}: needed" + (f", one of {', '.join(FORMATS)}" if name == "format" else "")
        if self.format in ("single-file", "lora") and not str(self.output).endswith(".safetensors"):
            yield f"--output={self.output}: --format={self.format} writes a file; its name must end in .safetensors"
        if self.rank != "auto" and not (self.rank.isdigit() and int(self.rank)):
            yield f"--rank={self.rank}: must be auto or a whole number, 1 or more"
        if self.format != "lora" and self.rank != "auto":
            yield f"--rank={self.rank}: belongs to --format=lora"
        if self.rank != "auto" and self.energy is not None:
            yield f"--energy={self.energy}: has no effect with --rank={self.rank}; drop one of the two"
        if self.format == "peft" and self.precision != "fp32":
            yield f"--precision={self.precision}: an adapter for peft is always fp32; drop the flag"


@dataclass
class ExportConfig(Config):
    """Everything that export.py can be told."""

    result: ExportSettings
    adapters: AdapterChoice

    def faults(self) -> Iterator[str]:
        if not self.adapters.adapter:
            yield "--adapter: needed, the folder of a run"


def main(argv: Sequence[str] | None = None) -> None:
    config = read_config(ExportConfig, argv, __doc__)
    result, output = config.result, Path(config.result.output)
    if output.exists():
        raise InputError(f"--output={output}: exists already; give another name")
    check_writable(output.parent, "--output")
    pipeline, strengths = load_chosen(config.adapters)
    if result.mix:
        mix_adapters(pipeline, strengths, "mixture")
    name = pipeline.name_or_path
    if result.format == "single-file":
        lost = save_single_file(pipeline, output, result.precision)
        use = how_to_load(output, name)
    elif result.format == "lora":
        rank = None if result.rank == "auto" else int(result.rank)
        report, lost = save_lora(pipeline, output, rank, result.energy, result.precision)
        print_table(report)
        use = f'pipeline.load_lora_weights("{output}")'
    else:
        lost = save_for_peft(pipeline, output)
        part = "unet" if hasattr(pipeline, "unet") else "transformer"
        use = f'PeftModel.from_pretrained(pipeline.{part}, "{output}/{part}")'
    print("\n".join(f"lost: {text}" for text in lost) or "nothing lost")
    print(f"written: {output}\nto use it: {use}")


def print_table(report: Sequence[Truncation]) -> None:
    """A line a layer: its rank, the most it can have, the share of its squared change that the rank keeps."""
    width = max(len(row.layer) for row in report)
    print(f"{'layer':{width}}  rank  of  energy kept")
    for row in report:
        print(f"{row.layer:{width}}  {row.rank:4d}  {row.full_rank:3d}  {row.energy:.3f}")
    ranks = sorted(row.rank for row in report)
    print(f"{len(report)} layers, ranks {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}")


if __name__ == "__main__":
    sys.exit(run_command(main))
