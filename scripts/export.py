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
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.inference import ExportConfig
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(ExportConfig, __doc__)  # before the slow imports

from finetuning.adapters.choice import load_chosen
from finetuning.adapters.pipelines import mix_adapters
from finetuning.errors import InputError
from finetuning.export.lora import Truncation, save_lora
from finetuning.export.peft import save_for_peft
from finetuning.export.single_file import how_to_load, save_single_file
from finetuning.settings.folders import check_writable


def main(argv: Sequence[str] | None = None) -> None:
    export(read_config(ExportConfig, argv, __doc__))


def export(config: ExportConfig) -> None:
    """Load the base with the chosen adapters, write them in a format, and print what the format cannot hold."""
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
    """Print for each layer its rank, its full rank, and the share of its squared change that the rank keeps."""
    width = max(len(row.layer) for row in report)
    print(f"{'layer':{width}}  rank  of  energy kept")
    for row in report:
        print(f"{row.layer:{width}}  {row.rank:4d}  {row.full_rank:3d}  {row.energy:.3f}")
    ranks = sorted(row.rank for row in report)
    print(f"{len(report)} layers, ranks {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}")


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: export(config)))
