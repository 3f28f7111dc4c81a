"""Before torch is imported: flags are checked, and processes that accelerate did not start are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetuning.run.launch import is_alone, launch_arguments, start_processes

ROOT = Path(__file__).resolve().parent.parent.parent


def test_flags_are_checked_without_torch():
    """The child has no torch, and finds the fault all the same."""
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('train_dreambooth.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "--sed=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: unknown flag --sed; did you mean seed?" in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_without_a_letter_ends_nothing():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "train_dreambooth.py"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and r"[--flag=value \u2026]" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("python /usr/bin/accelerate launch --cpu x.py --a", ["--cpu", "x.py", "--a"]),
        ("/usr/bin/accelerate-launch --cpu x.py", ["--cpu", "x.py"]),
        ("python -m accelerate.commands.launch x.py", ["x.py"]),
        ("python x.py launch", None),
        ("bash", None),
        ("", None),
    ],
)
def test_the_launcher_is_known_by_its_command(command, arguments):
    assert launch_arguments(command.split()) == arguments


def test_one_process_in_the_place_of_several_is_noticed():
    cpu = {"ACCELERATE_USE_CPU": "True"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert is_alone({**cpu, **address})
    assert not is_alone(cpu), "one process was asked for"
    assert not is_alone(address)
    assert not is_alone({**cpu, **address, "WORLD_SIZE": "2"}), "one of several"
    assert not is_alone({**cpu, **address, "PMI_SIZE": "2"}), "started by MPI"


@pytest.fixture
def handlers():
    """torch's launcher leaves its signal handlers behind."""
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


SCRIPT = """
import os, pathlib, signal, sys, time
rank, told, folder = os.environ["RANK"], sys.argv[1], pathlib.Path(__file__).parent
def stop(number, frame):
    with open(folder / f"{told}-stopped-{rank}", "a") as file:
        file.write("x")
    time.sleep(0.5)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / f"{told}-{rank}-of-{os.environ['WORLD_SIZE']}").touch()
if told != "signal":
    sys.exit(int(told))
while rank == "0" and not (folder / "signal-1-of-2").exists():
    time.sleep(0.01)
if rank == "0":
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_exit_codes_and_signals_pass_through(tmp_path, handlers):
    """Processes end with a code; or one sends a signal to the launcher, which passes it on to both, once."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for told, code in (("0", 0), ("3", 3), ("signal", 143)):
        assert start_processes(2, [str(script), told]) == code
        assert (tmp_path / f"{told}-0-of-2").exists()
    assert [(tmp_path / f"signal-stopped-{rank}").read_text() for rank in (0, 1)] == ["x", "x"]
