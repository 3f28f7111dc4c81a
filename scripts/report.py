#!/usr/bin/env python
"""Write report.html into a run's folder: one file that opens without a network.

    python scripts/report.py data/output/dreambooth

Works while a run is still going, too; scores appear in it after scripts/evaluate.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.publishing.report import write_report
from finetuning.settings.reading import run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="the --output_dir of a run, or of several")
    for run in parser.parse_args(argv).run:
        print(write_report(run))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
