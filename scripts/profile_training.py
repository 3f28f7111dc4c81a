#!/usr/bin/env python
"""Where a training step's time goes, with and without caches.

    python scripts/profile_training.py                         the embedded mug on the embedded base
    python scripts/profile_training.py --precision=bf16        the same in bfloat16
    python scripts/profile_training.py -- --use_lora --rank=4 --instance_data_dir=… …

What follows `--` are flags of train_dreambooth.py. Runs with and without caches take turns, so that a busy machine
disturbs both alike; times are those of the fastest step, in processor time of this process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that processor time is time

from finetuning.config import read_config, run_command  # noqa: E402
from finetuning.dataset import ImageStream  # noqa: E402
from finetuning.settings import DreamBoothConfig  # noqa: E402
from train_dreambooth import DreamBooth  # noqa: E402

MUG = [
    f"--instance_data_dir={ROOT / 'data/toyworld/subjects/mug'}", "--instance_prompt=a photo of qwe mug",
    "--with_prior_preservation", "--class_prompt=a photo of a mug", "--num_class_images=16", "--guidance_scale=3",
    "--train_batch_size=6", "--use_boft", "--boft_block_size=8", "--boft_n_butterfly_factor=2",
]  # fmt: skip
WITHOUT = ["--no_cache_latents", "--no_pre_compute_text_embeddings"]
WARM_UP = 2  # steps that are not counted
READING, ENCODING = "reading", "latents"
PARTS = (READING, ENCODING, "text", "forward", "backward", "optimizer", "log", "the rest")


class TimedStream:
    """An ImageStream of which the reading is timed."""

    def __init__(self, stream: ImageStream, read: Callable):
        self.stream, self.read = stream, read

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def __getitem__(self, position: int):
        return self.read(position)


class Profiled(DreamBooth):
    """The trainer, which notes the processor time of each step by part."""

    def prepare(self) -> None:
        super().prepare()
        self.times: list[dict[str, float]] = []
        self.wrap(self.base, "encode_images", ENCODING)
        self.wrap(self, "encode_prompts", "text")
        self.wrap(self, "denoising_errors", "forward")
        self.wrap(self.run, "backward", "backward")
        self.wrap(self.run, "clip_gradients", "optimizer")
        begun: list[float] = []
        self.optimizer.register_step_pre_hook(lambda *_: begun.append(time.process_time()))
        self.optimizer.register_step_post_hook(lambda *_: self.note("optimizer", begun.pop()))
        self.wrap(self, "log", "log")
        self.streams = [TimedStream(stream, self.timed(stream.__getitem__, READING)) for stream in self.streams]
        self.run.steps = self.timed_steps(self.run.steps)

    def wrap(self, owner: object, name: str, part: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name), part))

    def timed(self, function: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.note(part, begun)

        return call

    def note(self, part: str, begun: float) -> None:
        self.times[-1][part] += time.process_time() - begun

    def timed_steps(self, steps: Callable) -> Callable:
        def call(first: int, last: int):
            for step in steps(first, last):
                self.times.append(defaultdict(float))
                begun = time.process_time()
                yield step
                self.times[-1]["all"] = time.process_time() - begun

        return call

    def finish(self, step: int) -> None:
        """Nothing is kept."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of a run, the first two not counted")
    parser.add_argument("--rounds", type=int, default=3, help="runs with caches, and as many without")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of the mug's runs")
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    options, training = parser.parse_args(argv[:at]), argv[at + 1 :]
    if not training:
        class_images = ROOT / "data/class_images" / f"profile-{options.precision}"
        training = [*MUG, f"--class_data_dir={class_images}", f"--mixed_precision={options.precision}"]
    times: dict[str, list[dict[str, float]]] = {"with caches": [], "without": []}
    for _ in range(options.rounds):
        for name, more in {"with caches": [], "without": WITHOUT}.items():
            times[name] += profile([*training, *more, f"--max_train_steps={options.steps}"])
    fastest = [min(steps, key=lambda step: step["all"]) for steps in times.values()]
    print(f"{'':16}" + "".join(f"{name:>22}" for name in times))
    for part in (*PARTS, "all"):
        print(f"{part:16}" + "".join(f"{1000 * s[part]:10.1f} ms {s[part] / s['all']:7.0%} " for s in fastest))
    print(f"caches make {fastest[1]['all'] / fastest[0]['all']:.2f} times the steps a second")
    return 0


def profile(training: Sequence[str]) -> list[dict[str, float]]:
    """Processor seconds of a run's steps, by part."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*training, f"--output_dir={folder}/output", "--report_to=none"]
        trainer = Profiled(read_config(DreamBoothConfig, arguments))
        trainer.train()
    for times in trainer.times:
        times["the rest"] = times["all"] - sum(times[part] for part in PARTS[:-1])
    return trainer.times[WARM_UP:]


if __name__ == "__main__":
    sys.exit(run_command(main))
