"""Runs stages in a process that is watched, so that none takes more than its share of the time or ends the others.

One process runs all stages in turn, so that libraries are loaded once. If it dies, or does not end in time, a new one
takes over for the stages that are left.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning import files as text_file
from finetuning.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[3]
LOG = "log.txt"
GRACE = 5.0  # seconds that a stage may take after its time to record that it has ended
START = 300.0  # seconds within which a process must have loaded torch


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        module: the module whose `run(check)` is the stage.
        share: its share of the time, in relation to the shares of the other stages.
    """

    module: str
    share: float


PACKAGE = "finetuning.studies.gpu_check"
STAGES: dict[str, Stage] = {  # the most important first
    "identities": Stage(f"{PACKAGE}.identities", 60),
    "synchronisations": Stage(f"{PACKAGE}.synchronisations", 45),
    "trainer": Stage(f"{PACKAGE}.trainer", 130),
    "cost": Stage(f"{PACKAGE}.cost", 190),
    "kernels": Stage(f"{PACKAGE}.kernels", 55),
}
Say = Callable[[str], None]


def supervise(stages: Mapping[str, Stage], device: str, tiny: bool, folder: Path, seconds: float, say: Say) -> bool:
    """Run stages one after another, each in its share of the time that is left.

    Args:
        stages: {name: stage}, in the order in which they run.
        device: "cuda" or "cpu".
        tiny: whether to rehearse with small shapes.
        folder: where all results are written.
        seconds: the time for all stages together.
        say: is called with a line about each stage.

    Returns:
        Whether all stages have ended without an error, or were stopped because their time was over.

    Raises:
        InputError: if there is no such device.
        RunError: if the process that measures cannot be started.
    """
    ends = time.time() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    worker: Worker | None = None
    is_well = True
    try:
        for number, (name, stage) in enumerate(stages.items()):
            if worker is None:
                worker = Worker(device, tiny, folder, say)
            begun, left = time.time(), ends - time.time()
            share = left * stage.share / sum(other.share for other in list(stages.values())[number:])
            say(f"{name}: up to {max(0, share):.0f} s")
            status = worker.run(name, stage.module, begun + share)
            if not worker.is_sound:
                worker.end()
                worker = None
            say(f"{name}: {status}, {time.time() - begun:.0f} s")
            is_well &= status in ("done", "stopped at its share of the time")
    finally:
        if worker is not None:
            worker.end()
    return is_well


class Worker:
    """The process that runs stages, see worker.py.

    Attributes:
        is_sound: whether the process can run another stage.
        found: the description of the machine, as the process gave it.
    """

    def __init__(self, device: str, tiny: bool, folder: Path, say: Say) -> None:
        self.folder, self.is_sound, self._unread = folder, True, b""
        task = {"device": device, "tiny": tiny, "folder": str(folder.resolve())}
        with open(folder / LOG, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{PACKAGE}.worker", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env=environment(folder, device),
                start_new_session=True,  # so that it can be ended with all that it has started
            )
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        answer = self._answer(time.time() + START)
        if answer is None or "fault" in answer:
            self.end()
            if answer is None:
                raise RunError(f"the process that measures does not start: {self._last_words()}")
            raise InputError(answer["fault"])
        self.found = answer["found"]
        say(", ".join(f"{key} {value}" for key, value in self.found.items() if value not in (None, False)))

    def run(self, name: str, module: str, ends: float) -> str:
        """Run a stage until `time.time()` reaches `ends` at most; returns the status with which it ended."""
        path = self.folder / f"{name}.json"
        path.unlink(missing_ok=True)
        try:
            self._stdin.write(json.dumps({"stage": name, "module": module, "ends": ends}).encode() + b"\n")
            answer = self._answer(ends + GRACE)
        except BrokenPipeError:
            answer = None
        if answer is not None:
            self.is_sound = answer["sound"]
            return answer["status"]
        self.is_sound = False
        is_running = self._process.poll() is None
        self.end()
        status, errors = ("stopped at its share of the time", {}) if is_running else ("failed", {})
        if not is_running:
            code = self._process.returncode
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            errors = {"the stage": f"its process ended with {ended}: {self._last_words()}"}
        amend(path, name, status, errors, self.found)
        return status

    def end(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stdin.close()
        self._stdout.close()

    def _answer(self, until: float) -> dict[str, Any] | None:
        """The next message of the process, or None if it has ended or the time is over."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._stdout], [], [], max(0.0, until - time.time()))
            part = os.read(self._stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                if ready:
                    self._process.wait()
                return None
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> str:
        """The last line of the log, and where the whole of it is."""
        text = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        return f"{(text.splitlines() or ['it said nothing'])[-1]} (all of it: {self.folder / LOG})"


def environment(folder: Path, device: str) -> dict[str, str]:
    """Environment variables of the process: offline, this repository first on the path, and caches in the folder.

    On a CPU they also hide all GPUs.
    """
    cache = (folder / "cache").resolve()
    (cache / "tmp").mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    only_cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return {
        **os.environ,
        **(only_cpu if device == "cpu" else {}),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(cache / "huggingface"),
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCH_EXTENSIONS_DIR": str(cache / "extensions"),
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TMPDIR": str(cache / "tmp"),
    }


def amend(path: Path, name: str, status: str, errors: dict[str, str], found: dict[str, Any]) -> None:
    """Record how a stage ended that could not record it itself; what it had measured is kept."""
    content: dict[str, Any] = {"stage": name, "found": found, "results": {}, "errors": {}, "left_out": []}
    if path.is_file():
        content |= json.loads(path.read_text(encoding="utf-8"))
    content["status"] = status
    content["errors"] |= errors
    text_file.write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
