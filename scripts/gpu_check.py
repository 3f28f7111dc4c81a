#!/usr/bin/env python
"""Check and measure everything on a GPU: is the adapter exact there, does the trainer train, what does it cost?

    python scripts/gpu_check.py --output results                       eight minutes on the first CUDA GPU
    python scripts/gpu_check.py --output results --only cost kernels   these stages, which then have all of the time
    python scripts/gpu_check.py --output results --device cpu --tiny   a rehearsal without a GPU, in a minute or two

It needs no network and no installation of this repository, and writes only into the folder of the results. Each stage
writes STAGE.json while it measures; if a stage fails, its error is written there too, and the next stage begins.
summary.md holds the tables of all stages that have results, and docs/gpu.md explains them. The exit code is 1 if a
stage has failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.dont_write_bytecode = True  # nothing is written outside of the folder of the results
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    from finetuning.errors import InputError
    from finetuning.settings.reading import read_config, run_command
    from finetuning.settings.studies import GpuCheckConfig
    from finetuning.studies.gpu_check import machine
    from finetuning.studies.gpu_check.summary import write_summary
    from finetuning.studies.gpu_check.supervisor import STAGES, supervise
except ModuleNotFoundError as error:  # PyYAML is missing; `found.packages` looks for the others
    print(f"error: {error.name} is not installed; pip install -r requirements.txt -c constraints.txt", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    check = read_config(GpuCheckConfig, argv, __doc__).check
    output = Path(check.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={output}: cannot be made ({error.strerror}); give another folder") from None

    print("\n".join(machine.packages(ROOT / "constraints.txt")), flush=True)
    stages = {name: stage for name, stage in STAGES.items() if name in check.only}
    try:
        is_well = supervise(
            stages, check.device, check.tiny, output, 60 * check.minutes, lambda text: print(text, flush=True)
        )
    finally:
        summary = write_summary(output)
    print(f"results: {summary}")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
