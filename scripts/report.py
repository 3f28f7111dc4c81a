#!/usr/bin/env python
"""Write report.html into a run's folder: one file that opens without a network.

    python scripts/report.py data/output/dreambooth

It also works while a run is still training. Scores appear in it after scripts/evaluate.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.evaluation import ReportConfig
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(ReportConfig, __doc__)  # before the slow imports

from finetuning.publishing.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    report(read_config(ReportConfig, argv, __doc__))


def report(config: ReportConfig) -> None:
    """Write the reports, and print where they are."""
    for run in config.runs.run:
        print(write_report(Path(run)))


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: report(config)))
