#!/usr/bin/env python
"""Score what a run has trained.

    python scripts/evaluate.py toyworld data/output/dreambooth      # an embedded subject, by the toy world's own judge

Writes scores.json into the run's folder and prints a table: a row for the base model, a row for the tuned one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.config import InputError, run_command
from finetuning.inference import load_base, load_run, load_run_config
from toyworld.measure import generate
from toyworld.scores import Judges, score, table
from toyworld.subjects import SUBJECTS

DATA = Path(__file__).resolve().parents[1] / "data" / "toyworld"


def toyworld(run: Path, judge: Path = DATA / "judge") -> dict:
    """Score a run on an embedded subject beside its base; returns and writes the scores."""
    config = load_run_config(run)
    card = Path(config["instance_data_dir"]) / "subject.json"
    subject = json.loads(card.read_text())["name"] if card.is_file() else None
    if subject not in SUBJECTS:
        raise InputError(
            f"--instance_data_dir={config['instance_data_dir']}: not an embedded subject, and the toy world's judge "
            f"knows no other; it has {', '.join(SUBJECTS)}"
        )
    judges = Judges(judge, subject)
    base, pictures = score(partial(generate, load_base(config["pretrained_model_name_or_path"])), judges, word="")
    tuned, _ = score(partial(generate, load_run(run)), judges, base_pictures=pictures)
    result = {"subject": subject, "base": asdict(base), "tuned": asdict(tuned)}
    (run / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table({"base model": base, "tuned": tuned}))
    print(f"\nsubject: 0 = like any other {judges.category}, 1 = the subject itself; {run / 'scores.json'}")
    if (picture := run / "comparison.png").is_file():
        print(f"the picture: {picture}")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("toyworld", help="an embedded subject, by the toy world's own judge")
    command.add_argument("run", type=Path, help="the --output_dir of a run")
    args = parser.parse_args(argv)
    toyworld(args.run)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
