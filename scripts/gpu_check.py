#!/usr/bin/env python
"""Checks and measures everything on a GPU: is the adapter exact there, does the trainer train, what does it cost?

    python scripts/gpu_check.py --output results                       eight minutes on the first CUDA GPU
    python scripts/gpu_check.py --output results --only cost kernels   these stages, which then have all of the time
    python scripts/gpu_check.py --output results --device cpu --tiny   a rehearsal without a GPU, in a minute or two

Needs no network and no installation of this repository, and writes into DIR alone. Each stage writes DIR/STAGE.json
as it measures; one that fails puts down its error, and the next goes on. DIR/summary.md holds the tables of all stages
whose results are there. docs/gpu.md says what each tells. The exit code is 1 if a stage has failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.dont_write_bytecode = True  # nothing is written outside of DIR
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    from finetuning.errors import InputError
    from finetuning.settings.fields import run_command
    from finetuning.studies.gpu_check import machine
    from finetuning.studies.gpu_check.summary import write_summary
    from finetuning.studies.gpu_check.supervisor import STAGES, supervise
except ModuleNotFoundError as error:  # of PyYAML; the others are looked for below
    print(f"error: {error.name} is not installed; pip install -r requirements.txt -c constraints.txt", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8, help="all stages together take no longer (default: 8)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
                        help=f"some of {', '.join(STAGES)}")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps: figures mean nothing")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < 24 * 60:
        raise InputError(f"--minutes={args.minutes}: must be more than 0, and less than a day")
    if args.device == "cpu" and not args.tiny:
        raise InputError("--device=cpu: real shapes would take hours there; add --tiny to rehearse")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={args.output}: cannot be made ({error.strerror}); give another folder") from None

    print("\n".join(machine.packages(ROOT / "constraints.txt")), flush=True)
    stages = {name: stage for name, stage in STAGES.items() if name in args.only}
    try:
        is_well = supervise(
            stages, args.device, args.tiny, args.output, 60 * args.minutes, lambda text: print(text, flush=True)
        )
    finally:
        summary = write_summary(args.output)
    print(f"results: {summary}")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
