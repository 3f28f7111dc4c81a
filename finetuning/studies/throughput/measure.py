"""What training costs end to end: seconds a step and peak memory of this project's trainer and of peers' plain loops.

Each candidate and the reference train side by side in processes of their own and take turns step by step, so that a
machine whose speed comes and goes disturbs both alike; what counts is the ratio of neighbouring steps. A plain loop
is what one writes around peft and diffusers: latents and prompts encoded once as by the trainer, the same batch,
optimizer and clipping, and diffusers' own choice of attention.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from finetuning.errors import RunError

PROMPTS = ("a photo of qwe mug", "a photo of a mug")  # of the subject and of the class


@dataclass(frozen=True)
class Workload:
    """What every candidate trains.

    Attributes:
        base: folder of the pipeline; images: folder with `photos` and `class`; resolution: side in pixels.
        batch: photos in a step, as many class images come on top; targets: preset or endings of the adapted layers.
        precision: no, bf16 or fp16; steps: of a round; warmup: how many of them do not count; threads: of torch.
    """

    base: str
    images: str
    resolution: int
    batch: int
    targets: str
    precision: str
    steps: int
    warmup: int
    threads: int


Settings = dict[str, Any]
BOFT = {"use_boft": True, "boft_block_size": 8}
REFERENCE = "plain loop, LoRA r=16 (peft)"
CANDIDATES: dict[str, Settings | str] = {  # settings of the trainer, or the name of a plain loop
    "trainer, BOFT b=8 m=1": {**BOFT, "boft_n_butterfly_factor": 1},
    "trainer, BOFT b=8 m=2": {**BOFT, "boft_n_butterfly_factor": 2},
    "trainer, LoRA r=16": {"use_lora": True, "rank": 16},
    "plain loop, BOFT b=8 m=1 (peft)": "boft",
    REFERENCE: "lora",
}


def measure(
    candidates: dict[str, Settings | str], reference: str, work: Workload, trainer: Path, folder: Path, rounds: int
) -> dict[str, dict[str, float]]:
    """What each candidate costs, one of them being the reference.

    Returns:
        {candidate: {step / reference, seconds a step, steps a second, peak GiB, trainable}}: medians over all steps
        that count; seconds are the reference's times the ratio.

    Raises:
        RunError: a candidate has failed.
    """
    ratios: dict[str, list[float]] = {name: [1.0] if name == reference else [] for name in candidates}
    peaks, trained, seconds = dict.fromkeys(candidates, 0.0), {}, []
    for round_ in range(rounds):
        for name in (name for name in candidates if name != reference):
            with ExitStack() as stack:
                racers = {
                    n: stack.enter_context(Racer(candidates[n], work, trainer, folder / part))
                    for n, part in ((name, "own"), (reference, "reference"))
                }
                for n, racer in racers.items():
                    trained[n] = int(racer.read("trained"))
                for step in range(work.steps):
                    order = (name, reference) if step % 2 else (reference, name)
                    taken = {n: racers[n].step() for n in order}
                    if step >= work.warmup:
                        ratios[name].append(taken[name] / taken[reference])
                        seconds.append(taken[reference])
                for n, racer in racers.items():
                    peaks[n] = max(peaks[n], racer.read("peak"))
            now = statistics.median(ratios[name])
            print(f"  round {round_ + 1} of {rounds}: {name}, {now:.2f} of {reference}", file=sys.stderr)
    usual = statistics.median(seconds)
    results = {}
    for name in candidates:
        ratio = statistics.median(ratios[name])
        results[name] = {
            "step / reference": ratio,
            "seconds a step": ratio * usual,
            "steps a second": 1 / (ratio * usual),
            "peak GiB": peaks[name],
            "trainable": trained[name],
        }
    return results


class Racer:
    """A process that trains, one step at a time, see loops.py."""

    def __init__(self, what: Settings | str, work: Workload, trainer: Path, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        task = {"plain": what, "work": asdict(work)} if isinstance(what, str) else None
        if task is None:
            config = folder / "flags.yaml"
            config.write_text(yaml.safe_dump(trainer_settings(what, work, folder / "run")), encoding="utf-8")
            task = {"trainer": str(trainer), "config": str(config)}
        root = str(Path(__file__).resolve().parents[3])
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetuning.studies.throughput.loops", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env={**os.environ, "OMP_NUM_THREADS": str(work.threads), "PYTHONPATH": root},
            )

    def step(self) -> float:
        """Seconds of the next step."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # told better by what it has left
        return self.read("seconds")

    def read(self, key: str) -> float:
        """A number that the process says when it has it.

        Raises:
            RunError: it has ended instead.
        """
        line = self.process.stdout.readline()
        if not line:
            last = (self.log.read_text(encoding="utf-8").strip().splitlines() or ["–"])[-1]
            raise RunError(f"a timed run ended with exit code {self.process.wait()}: {last}")
        return float(json.loads(line)[key])

    def __enter__(self) -> Racer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def trainer_settings(settings: Settings, work: Workload, output: Path) -> Settings:
    """All flags of a timed run of the trainer."""
    config = {
        "pretrained_model_name_or_path": work.base, "instance_data_dir": f"{work.images}/photos",
        "instance_prompt": PROMPTS[0], "with_prior_preservation": True, "class_data_dir": f"{work.images}/class",
        "class_prompt": [PROMPTS[1]], "num_class_images": len(list(Path(work.images, "class").glob("*.png"))),
        "resolution": work.resolution, "center_crop": True, "train_batch_size": work.batch,
        "max_train_steps": work.steps, "mixed_precision": work.precision, "learning_rate": 1e-4,
        "report_to": "none", "overwrite_output_dir": True, "output_dir": str(output), **settings,
    }  # fmt: skip
    for kind in ("boft", "lora"):
        if settings.get(f"use_{kind}"):
            config.setdefault(f"{kind}_target_modules", [work.targets])
    return config
