"""What launchers leave in the environment, and that what they ask for is what is built."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from training import flags, metrics, run, run_in_two

from finetuning.errors import InputError
from finetuning.run.launchers import check_accumulation, check_engine, check_gpus, precision, processes_asked

OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 1),
        (TORCHRUN, 4),
        ({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 4),
        ({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 4),
        ({**OMPI, "MASTER_ADDR": "127.0.0.1"}, 2),
        ({"PMI_SIZE": "3", "PMI_RANK": "2", "MASTER_ADDR": "127.0.0.1"}, 3),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1),  # a batch script that asks for 8 cores
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, 1),
    ],
)
def test_the_number_of_processes_is_the_launchers(environment, size):
    assert processes_asked(environment) == size


def test_what_mpi_says_is_said_in_the_words_of_torch():
    environment = {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes_asked(environment)
    said = {name: environment[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert said == {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert environment["MASTER_PORT"].isdigit()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK=None.*unset"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x"}, "RANK=2"),
        ({"RANK": "1"}, "RANK=1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR.*torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (OMPI, "OMPI_COMM_WORLD_SIZE=2.*torchrun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, "MV2_COMM_WORLD_SIZE=2"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun has started 2 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun has started 2 processes"),
        ({"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}, "srun has started 2"),
        ({"WORLD_SIZE": "1", "RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2"),
    ],
)
def test_processes_that_would_be_runs_of_their_own_are_refused(environment, words):
    with pytest.raises(InputError, match=words):
        processes_asked(environment)


def test_what_else_accelerate_may_be_told():
    assert precision({}, None) == "no" and precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, None) == "bf16"
    assert precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, "no") == "no", "the flag counts"
    with pytest.raises(InputError, match=r"ACCELERATE_MIXED_PRECISION=fp8.*--mixed_precision"):
        precision({"ACCELERATE_MIXED_PRECISION": "fp8"}, None)
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        check_engine({f"ACCELERATE_USE_{engine}": "false"})
        with pytest.raises(InputError, match=f"ACCELERATE_USE_{engine}=true.*MULTI_GPU"):
            check_engine({f"ACCELERATE_USE_{engine}": "true"})
    check_accumulation({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 4)
    with pytest.raises(InputError, match="--gradient_accumulation_steps is 1"):
        check_accumulation({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 1)
    check_gpus({"LOCAL_RANK": "1"}, 2)
    check_gpus({"LOCAL_RANK": "1"}, 0)
    with pytest.raises(InputError, match="LOCAL_RANK=1: this machine has 1 GPU;"):
        check_gpus({"LOCAL_RANK": "1"}, 1)


def test_two_processes_without_a_gpu_are_one_run(toy_base, photos, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert run_in_two(*flags(toy_base, photos, tmp_path / "output", "--max_train_steps=2")) == 0
    assert [line["step"] for line in metrics(tmp_path / "output")] == [1, 2], "one log"


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "SLURM_STEP_NUM_TASKS"])
def test_wrong_launches_end_before_anything_is_loaded(variable, toy_base, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, "2" if variable.startswith("SLURM") else "true")
    arguments = flags(tmp_path / "nowhere", photos, tmp_path / "output")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and "nowhere" not in error
    assert not (tmp_path / "output").exists()


def test_the_precision_of_accelerates_configuration_is_taken(toy_base, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    output = tmp_path / "output"
    assert run(*flags(toy_base, photos, output, "--max_train_steps=1")) == 0
    said = capsys.readouterr().err
    assert "mixed precision bf16, for which accelerate is configured" in said and "torch.bfloat16" in said
    assert "mixed_precision: bf16" in (output / "config.yaml").read_text()
    more = ["--max_train_steps=1", "--mixed_precision=no"]
    assert run(*flags(toy_base, photos, tmp_path / "other", *more)) == 0
    said = capsys.readouterr().err
    assert "torch.float32" in said and "accelerate is configured" not in said
