"""Training, drawing, merging, exporting and the page use nothing that Windows lacks; windows.py stands in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

from control_training import control_flags, control_folder
from training import flags, prior_flags

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import importlib, json, sys
import windows

if __name__ == "__main__":
    windows.stand_in()
    from finetuning.settings.reading import run_command

    for name, argv in json.loads(sys.argv[1]):
        program = importlib.import_module(name)
        if argv is None:
            continue
        code = run_command(program.main, argv)
        if code:
            sys.exit(f"{name} {argv}: {code}")
"""


def test_the_stand_in_lacks_what_windows_lacks(tmp_path):
    (tmp_path / "tried.py").write_text(
        "import os, signal\ntry:\n    import fcntl\nexcept ModuleNotFoundError:\n    fcntl = None\n"
    )
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import windows; windows.ROOT = sys.argv[2]; windows.stand_in()\n"
        "import tried; assert tried.fcntl is None and not hasattr(tried.os, 'O_DIRECTORY')\n"
        "assert not hasattr(tried.signal, 'SIGKILL') and hasattr(tried.signal, 'SIGTERM')\n"
        "try:\n    tried.os.open(sys.argv[2], 0)\nexcept PermissionError:\n    print('as on Windows')\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "as on Windows\n", done.stderr


def test_everything_runs_there(toy_base, photos, tmp_path):
    """Twice over what stands, with a process that reads ahead, and from a checkpoint on."""
    run, control, data = tmp_path / "mug", tmp_path / "control", control_folder(tmp_path / "data")
    train = flags(
        toy_base, photos, run, "--validation_prompt=a red mug", "--max_train_steps=2", "--checkpointing_steps=1",
        "--checkpoints_total_limit=1", *prior_flags(tmp_path / "class"),
    )  # fmt: skip
    again = control_flags(toy_base, data, control, "--max_train_steps=1", "--overwrite_output_dir")
    work = [
        ("train_dreambooth", [*train, "--max_train_steps=1"]),
        ("train_dreambooth", [*train, "--resume_from_checkpoint=latest", "--max_train_steps=2"]),
        ("train_dreambooth", [*train, "--overwrite_output_dir"]),
        ("train_controlnet", [*again, "--random_flip", "--dataloader_num_workers=1"]),
        ("scripts.generate", [f"--adapter={run}", "--prompt", "a: mug? *", f"--output_dir={tmp_path / 'drawn'}",
                              "--num_inference_steps=1"]),
        ("scripts.generate", [f"--adapter={control}", "--prompt", "a mug", f"--output_dir={tmp_path / 'drawn'}",
                              f"--control={data / '0.png'}", "--num_inference_steps=1"]),
        ("scripts.merge", [f"--adapter={run}:0.5", f"--output_dir={tmp_path / 'merged'}"]),
        *(("scripts.export", [f"--adapter={run}", f"--format={kind}", f"--output={tmp_path / name}"])
          for kind, name in (("peft", "peft"), ("single-file", "one.safetensors"), ("lora", "lora.safetensors"))),
        *((f"scripts.{name}", None)
          for name in ("app", "push", "quickstart", "prepare_dataset", "evaluate", "report")),
    ]  # fmt: skip
    (tmp_path / "work.py").write_text(WORK)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(tmp_path / "work.py"), json.dumps(work)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "peak_memory_gib" in (run / "metrics.jsonl").read_text()
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2"}
    names = [path.name for path in tmp_path.rglob("*") if set(path.name) & set('<>:"|?*\\')]
    assert not names, "which Windows cannot have"
