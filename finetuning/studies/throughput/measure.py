"""What training costs: seconds a step and peak memory of this project's trainer and of plain loops around peft.

Each candidate and the reference train side by side, in processes of their own, and take turns step by step. A machine
whose speed varies thus disturbs both alike, and what counts is the ratio of neighbouring steps. A plain loop is what
one writes around peft and diffusers: latents and prompts are encoded once, as the trainer does it; batch, optimizer
and clipping are the same; attention is diffusers' own choice.
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
        base: the folder of the pipeline.
        images: a folder that holds the folders `photos` and `class`.
        resolution: side of the images in pixels.
        batch: photos in a step; as many class images are added.
        targets: the preset, or the endings, of the adapted layers.
        precision: "no", "bf16" or "fp16".
        steps: the number of steps in a round.
        warmup: how many of these steps do not count.
        threads: the number of torch's threads.
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
    """Measure what each candidate costs.

    Args:
        candidates: {name: settings of the trainer, or the name of a plain loop}.
        reference: the name of the candidate with which the others are compared.
        work: what all of them train.
        trainer: the trainer's script.
        folder: where the processes write their files.
        rounds: how often each candidate trains beside the reference.

    Returns:
        {candidate: {step / reference, seconds a step, steps a second, peak GiB, trainable}}: medians over all steps
        that count. Seconds are those of the reference times the ratio.

    Raises:
        RunError: if a candidate fails.
    """
    ratios: dict[str, list[float]] = {name: [1.0] if name == reference else [] for name in candidates}
    peaks = dict.fromkeys(candidates, 0.0)
    trained: dict[str, int] = {}
    seconds: list[float] = []
    for round_ in range(rounds):
        for name in (name for name in candidates if name != reference):
            with ExitStack() as stack:
                processes = {
                    n: stack.enter_context(TimedProcess(candidates[n], work, trainer, folder / part))
                    for n, part in ((name, "own"), (reference, "reference"))
                }
                for n, process in processes.items():
                    trained[n] = int(process.read("trained"))
                for step in range(work.steps):
                    order = (name, reference) if step % 2 else (reference, name)
                    taken = {n: processes[n].step() for n in order}
                    if step >= work.warmup:
                        ratios[name].append(taken[name] / taken[reference])
                        seconds.append(taken[reference])
                for n, process in processes.items():
                    peaks[n] = max(peaks[n], process.read("peak"))
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


class TimedProcess:
    """A process that trains one step at a time, as it is asked to; see loops.py.

    Args:
        what: settings of the trainer, or the name of a plain loop.
        work: what is trained.
        trainer: the trainer's script.
        folder: where its log, and what the trainer writes, go.
    """

    def __init__(self, what: Settings | str, work: Workload, trainer: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        task: dict[str, Any]
        if isinstance(what, str):
            task = {"plain": what, "work": asdict(work)}
        else:
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
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        self._stdin, self._stdout = self.process.stdin, self.process.stdout

    def step(self) -> float:
        """Ask for the next step, and return how many seconds it took."""
        try:
            self._stdin.write("\n")
            self._stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; `read` says why
        return self.read("seconds")

    def read(self, key: str) -> float:
        """Wait for the process's next message, and return the number under this key.

        Raises:
            RunError: if the process has ended instead; says the last line of its log.
        """
        line = self._stdout.readline()
        if not line:
            last = (self.log.read_text(encoding="utf-8").strip().splitlines() or ["–"])[-1]
            raise RunError(f"a timed run ended with exit code {self.process.wait()}: {last}")
        return float(json.loads(line)[key])

    def __enter__(self) -> TimedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._stdin.close()
        self.process.terminate()
        self.process.wait()
        self._stdout.close()


def trainer_settings(settings: Settings, work: Workload, output: Path) -> Settings:
    """All settings of a timed run of the trainer: the candidate's own, and those that follow from the work."""
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
