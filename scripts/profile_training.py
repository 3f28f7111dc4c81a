#!/usr/bin/env python
"""Measure where the time of a training step goes, with and without caches.

    python scripts/profile_training.py                         the embedded mug on the embedded base
    python scripts/profile_training.py --precision=bf16        the same in bfloat16
    python scripts/profile_training.py -- --use_lora --rank=4 --instance_data_dir=… …

What follows `--` are flags of train_dreambooth.py. Runs with and without caches take turns, so that a busy machine
disturbs both alike. The times are those of the fastest step, in processor time of this process.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.reading import parse_or_exit, read_config, run_command, split_at_dashes
from finetuning.settings.studies import ProfileConfig

if __name__ == "__main__":
    own, training = split_at_dashes()
    config = parse_or_exit(ProfileConfig, __doc__, own)  # before the slow imports

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that processor time is time

from finetuning.run.clock import PHASES, Clock
from finetuning.settings.dreambooth import DreamBoothConfig
from train_dreambooth import DreamBooth

ROOT = Path(__file__).resolve().parents[1]
MUG = [
    f"--instance_data_dir={ROOT / 'data/toyworld/subjects/mug'}", "--instance_prompt=a photo of qwe mug",
    "--with_prior_preservation", "--class_prompt=a photo of a mug", "--num_class_images=16", "--guidance_scale=3",
    "--train_batch_size=6", "--use_boft", "--boft_block_size=8", "--boft_n_butterfly_factor=2",
]  # fmt: skip
WITHOUT = ["--no_cache_latents", "--no_pre_compute_text_embeddings"]
WARM_UP = 2  # steps that do not count
REST, ALL = "the rest", "all"


class Profiler:
    """Watches a trainer and notes the processor time of each step in seconds, by phase."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begins(self, step: int) -> None:
        """Note when a step begins."""
        self.begun = time.process_time()

    def ends(self, step: int, seconds: Mapping[str, float]) -> None:
        """Note what a step has taken. seconds: the time of its phases that the trainer has measured."""
        total = time.process_time() - self.begun
        phases = {phase: seconds.get(phase, 0.0) for phase in PHASES}
        self.steps.append({**phases, REST: total - sum(phases.values()), ALL: total})


def main(argv: Sequence[str] | None = None) -> int:
    own, training = split_at_dashes(argv)
    return compare_times(read_config(ProfileConfig, own, __doc__), training)


def compare_times(config: ProfileConfig, training: Sequence[str]) -> int:
    """Profile a training, by default the mug's, with and without caches in turn, and print its fastest steps."""
    measurement = config.measurement
    if not training:
        class_images = ROOT / "data/class_images" / f"profile-{measurement.precision}"
        training = [*MUG, f"--class_data_dir={class_images}", f"--mixed_precision={measurement.precision}"]
    times: dict[str, list[dict[str, float]]] = {"with caches": [], "without": []}
    for _ in range(measurement.rounds):
        for name, more in {"with caches": [], "without": WITHOUT}.items():
            times[name] += profile([*training, *more, f"--max_train_steps={measurement.steps}"])
    fastest = [min(steps, key=lambda step: step[ALL]) for steps in times.values()]
    print(f"{'':16}" + "".join(f"{name:>22}" for name in times))
    for part in (*PHASES, REST, ALL):
        print(f"{part:16}" + "".join(f"{1000 * s[part]:10.1f} ms {s[part] / s[ALL]:7.0%} " for s in fastest))
    print(f"caches make {fastest[1][ALL] / fastest[0][ALL]:.2f} times the steps a second")
    return 0


def profile(training: Sequence[str]) -> list[dict[str, float]]:
    """Train, and return the processor time of each step in seconds, by phase."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*training, f"--output_dir={folder}/output", "--report_to=none"]
        trainer, profiler = DreamBooth(read_config(DreamBoothConfig, arguments)), Profiler()
        trainer.training.clock = Clock(trainer.run.device, time.process_time)
        trainer.training.watchers.append(profiler)
        trainer.training.writes_results = False
        trainer.train()
    return profiler.steps[WARM_UP:]


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: compare_times(config, training)))
