"""Runs of the real command line in this process, and how to read what they wrote."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch
from conftest import START_METHOD
from safetensors.torch import load_file

import train_dreambooth
from finetuning.run.joining import forget_processes
from finetuning.settings.reading import run_command

BOFT = ("--use_boft", "--boft_block_size=4", "--boft_n_butterfly_factor=2")


def flags(base: Path, photos: Path, output: Path, *more: object, adapter: Sequence[str] = BOFT) -> list[str]:
    """A small run on small models."""
    return [
        f"--pretrained_model_name_or_path={base}",
        f"--instance_data_dir={photos}",
        "--instance_prompt=a photo of qwe mug",
        f"--output_dir={output}",
        "--train_batch_size=2",
        "--learning_rate=1e-2",
        "--max_train_steps=4",
        "--num_inference_steps=2",
        "--report_to=none",
        *adapter,
        *map(str, more),
    ]


def prior_flags(folder: Path, count: int = 3) -> list[str]:
    return [
        "--with_prior_preservation",
        f"--class_data_dir={folder}",
        f"--num_class_images={count}",
        "--class_prompt", "a photo of a mug", "a red mug",
    ]  # fmt: skip


def run(*arguments: object) -> int:
    """The exit code of train_dreambooth.py with these arguments."""
    forget_processes()
    return run_command(train_dreambooth.main, [str(a) for a in arguments])


def run_in_two(*arguments: object) -> int:
    """As `run`, in two processes, with the environment that a launcher gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context(START_METHOD)
    processes = [context.Process(target=_one_of_two, args=(rank, port, arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    wait([process.sentinel for process in processes])
    if any(process.exitcode for process in processes):
        for process in processes:
            process.kill()  # after SIGTERM the other one would wait for it
    for process in processes:
        process.join()
    return max(abs(process.exitcode) for process in processes)


def _one_of_two(rank: int, port: int, arguments: Sequence[object]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.exit(run(*arguments))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a result's or a checkpoint's adapters or modules."""
    return {
        f"{path.parent.name}/{name}": tensor
        for part in ("unet", "transformer", "text_encoder", "text_encoder_2")
        for path in sorted((folder / part).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left and left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def optimizer_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)["optimizer"]["state"]
    return {f"{index}/{key}": value for index, entry in state.items() for key, value in entry.items()}


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
