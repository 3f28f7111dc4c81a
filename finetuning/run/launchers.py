"""What launchers say in environment variables: how many processes there are, on what engine, in which precision.

torchrun, accelerate, MPI and SLURM set such variables. They must agree with what is built: several processes that do
not know of each other would be several runs in one folder.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from finetuning.errors import InputError

# For each launcher: number of processes, this one's rank, its rank on this machine, and how many are on this machine.
TORCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "PMI_SIZE": ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "MV2_COMM_WORLD_SIZE": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
LAUNCH = "torchrun --nproc_per_node=N or accelerate launch --num_processes N"


def check_engine(environment: Mapping[str, str]) -> None:
    """Check that accelerate is not configured to divide the model itself among processes.

    Raises:
        InputError: it is; names the variable.
    """
    for variable, engine in ENGINES.items():
        if is_true(environment.get(variable, "")):
            raise InputError(
                f"{variable}={environment[variable]}: accelerate's {engine} is not supported: adapters are small, and "
                "plain processes (DDP) share the work; choose MULTI_GPU in `accelerate config`, accelerate launch "
                "--multi_gpu, or unset the variable"
            )


def check_accumulation(environment: Mapping[str, str], accumulation: int) -> None:
    """Check that accelerate is not configured for another accumulation than --gradient_accumulation_steps.

    Raises:
        InputError: it is; names the variable.
    """
    asked = environment.get(ACCUMULATION, "")
    if asked.isdigit() and int(asked) != accumulation:
        raise InputError(
            f"{ACCUMULATION}={asked}: --gradient_accumulation_steps is {accumulation}; give that flag the same value, "
            "or unset the variable"
        )


def precision(environment: Mapping[str, str], asked: str | None) -> str:
    """The precision of training: what --mixed_precision asks for, or what `accelerate config` says without it.

    Args:
        asked: no, bf16 or fp16. None = the flag was not given.

    Returns:
        no, bf16 or fp16.

    Raises:
        InputError: accelerate is configured for a precision that the trainers do not have.
    """
    if asked is not None:
        return asked
    found = environment.get(PRECISION, "").strip().lower() or "no"
    if found not in ("no", "bf16", "fp16"):
        raise InputError(
            f"{PRECISION}={found}: accelerate is configured for a precision that is not supported; give "
            "--mixed_precision=bf16, fp16 or no"
        )
    return found


def processes_asked(environment: MutableMapping[str, str]) -> int:
    """How many processes the launcher says there are. MPI's variables are translated to torch's, in `environment`.

    Raises:
        InputError: the variables are incomplete or contradict each other, so that processes would train beside each
            other, or wait for others for ever.
    """
    sizes = {name: _number(environment, name) for name in ("WORLD_SIZE", *MPI)}
    if not sizes["WORLD_SIZE"]:
        _translate(environment, sizes)
    size = _number(environment, "WORLD_SIZE") or 1
    steps = {**{name: sizes[name] or 1 for name in MPI}, "SLURM": _slurm_tasks(environment)}
    for name, tasks in steps.items():
        if tasks > size:
            launcher = "srun" if name == "SLURM" else "mpirun"
            raise InputError(
                f"{launcher} has started {tasks} processes, of which {size} would train together, and the others "
                f"beside them in the same folder; start one process ({launcher} -n 1), or one a machine, each "
                f"{LAUNCH}"
            )
    rank = _number(environment, "RANK")
    if (size > 1 and rank is None) or (rank or 0) >= size:
        raise InputError(
            f"WORLD_SIZE={environment.get('WORLD_SIZE')}: RANK={environment.get('RANK')} does not say which of {size} "
            f"processes this is; start them with {LAUNCH}, or unset both to train in one"
        )
    if size > 1 and not environment.get("MASTER_ADDR"):
        raise InputError(
            f"WORLD_SIZE={size}: nothing says where {size} processes meet (MASTER_ADDR); start them with {LAUNCH}"
        )
    return size


def check_gpus(environment: Mapping[str, str], gpus: int) -> None:
    """Check that this process has a GPU of its own, if the machine has any.

    Args:
        gpus: how many this machine has.

    Raises:
        InputError: it would have to share a GPU with another process of the run.
    """
    local_rank = _number(environment, "LOCAL_RANK") or 0
    if gpus and local_rank >= gpus and not is_true(environment.get("ACCELERATE_USE_CPU", "")):
        raise InputError(
            f"LOCAL_RANK={local_rank}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}; start at most as many "
            "processes, or train on its CPUs with accelerate launch --cpu"
        )


def is_true(value: str) -> bool:
    """Whether a variable switches something on, as accelerate reads it."""
    return value.strip().lower() in ("1", "true", "yes", "y", "t", "on")


def _translate(environment: MutableMapping[str, str], sizes: Mapping[str, int | None]) -> None:
    """Set torch's variables from those of the MPI that has started several processes, if one has."""
    for name, others in MPI.items():
        if (sizes[name] or 1) == 1:
            continue
        if not environment.get("MASTER_ADDR"):
            raise InputError(
                f"{name}={sizes[name]}: mpirun has started {sizes[name]} processes, and nothing says where they meet; "
                f"start one with {LAUNCH}, or set MASTER_ADDR and MASTER_PORT"
            )
        found = {"WORLD_SIZE": sizes[name]}
        found |= {torch: _number(environment, mpi) for torch, mpi in zip(TORCH[1:], others)}
        environment.update({torch: str(number) for torch, number in found.items() if number is not None})
        environment.setdefault("MASTER_PORT", "29500")
        return


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """How many processes SLURM's job step has. A batch script belongs to no step; it may start a single process."""
    if (tasks := _number(environment, "SLURM_STEP_NUM_TASKS")) is not None:
        return tasks
    is_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    if "SLURM_PROCID" not in environment or (is_batch_script and environment["SLURM_PROCID"] == "0"):
        return 1
    return _number(environment, "SLURM_NTASKS") or 1


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The number in a variable; None = it is not set. Raises InputError if it holds something else."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not text.isdigit():
        raise InputError(f"{name}={text}: is no number of processes; start with {LAUNCH}, or unset the variable")
    return int(text)
