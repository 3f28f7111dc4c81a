"""From a model and a subject to the command that trains: which file of recipes/ fits, and what changes it.

Both shell scripts and scripts/quickstart.py train by the commands made here. Flags that are given beside them come
last and therefore count.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetuning.dreambooth.subjects import ROOT, dreambooth_subject, embedded_subject
from finetuning.errors import InputError
from finetuning.settings.shared import EMBEDDED_BASE

DEFAULT_SUBJECT = "mug"
VARIABLES = {  # of the environment, by the flag that they set
    "STEPS": "--max_train_steps",
    "FACTORS": "--boft_n_butterfly_factor",
    "BLOCK_SIZE": "--boft_block_size",
    "BLOCK_NUM": "--boft_block_num",
    "LEARNING_RATE": "--learning_rate",
    "SCALE_RATE": "--boft_scale_learning_rate",
    "RESOLUTION": "--resolution",
    "REPORT_TO": "--report_to",
    "PROJECT_NAME": "--wandb_project_name",
    "RUN_NAME": "--wandb_run_name",
}
DREAMBOOTH_VARIABLES = {**VARIABLES, "NUM_CLASS_IMAGES": "--num_class_images"}
CONTROL_VARIABLES = {
    **VARIABLES,
    "CONDITIONING": "--conditioning",
    "CONTROL_RATE": "--control_learning_rate",
    "BATCH_SIZE": "--train_batch_size",
    "DATASET_NAME": "--dataset_name",
}
# The size of blocks follows from their number and the other way round: who sets one unsets the recipe's other one.
INSTEAD = {"BLOCK_SIZE": "--boft_block_num=0", "BLOCK_NUM": "--boft_block_size=0"}
XFORMERS = "import torch, xformers; assert torch.cuda.is_available()"  # fails where xformers cannot be used
MOST_THREADS = 8  # more do not speed up the small embedded model


def dreambooth_command(environment: Mapping[str, str], index: int | None, more: Sequence[str]) -> list[str]:
    """Flags of train_dreambooth.py that teach a subject.

    Args:
        environment: its variables, such as STEPS, override the recipe and the subject's own prompts and folders.
        index: of a subject of google/dreambooth. None = the embedded subject that SUBJECT names.
        more: further flags, which override everything.

    Raises:
        InputError: if there is no such subject.
    """
    get, model = environment.get, model_name(environment, more)
    if index is None:
        subject = embedded_subject(get("SUBJECT") or DEFAULT_SUBJECT)
    else:
        subject = dreambooth_subject(index, get("UNIQUE_TOKEN") or "qwe")
    class_prompts, prompts, base_prompts = subject.class_prompts, subject.validation_prompts, subject.base_prompts
    if get("CLASS_PROMPT"):
        class_prompts = [environment["CLASS_PROMPT"]]
    if get("VALIDATION_PROMPT"):
        prompts, base_prompts = [environment["VALIDATION_PROMPT"]], []
    class_folder = ROOT / "data" / "class_images" / os.path.basename(os.path.abspath(model)) / subject.name
    return [
        f"--recipe={recipe('dreambooth', model)}",
        f"--pretrained_model_name_or_path={model}",
        f"--instance_data_dir={get('INSTANCE_DIR') or subject.instance_dir}",
        f"--instance_prompt={get('INSTANCE_PROMPT') or subject.instance_prompt}",
        f"--class_data_dir={get('CLASS_DIR') or class_folder}",
        "--class_prompt", *class_prompts,
        "--validation_prompt", *prompts,
        *(["--base_prompt", *base_prompts] if base_prompts else []),
        f"--output_dir={dreambooth_output(environment, index, subject.name)}", "--overwrite_output_dir",
        f"--report_to={'tensorboard' if index is None else 'wandb'}",  # wandb: offline where there is no key
        "--wandb_project_name=dreambooth", f"--wandb_run_name={subject.name}",
        *_from_variables(DREAMBOOTH_VARIABLES, environment),
        *_attention(model), *more,
    ]  # fmt: skip


def control_command(environment: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """Flags of train_controlnet.py that teach a light control; for the arguments see `dreambooth_command`."""
    model, output = model_name(environment, more), control_output(environment)
    own_data = ["--dataset_name=None", "--conditioning=None"] if flag_in(more, "--train_data_dir") else []
    return [
        f"--recipe={recipe('controlnet', model)}",
        f"--pretrained_model_name_or_path={model}",
        f"--output_dir={output}", "--overwrite_output_dir",
        "--wandb_project_name=controlnet", f"--wandb_run_name={os.path.basename(os.path.abspath(output))}",
        *own_data, *_from_variables(CONTROL_VARIABLES, environment),
        *_attention(model), *more,
    ]  # fmt: skip


def dreambooth_output(environment: Mapping[str, str], index: int | None, name: str) -> str:
    """The run's folder: OUTPUT_DIR, or one below data/output. `name` is the subject's."""
    folder = ROOT / "data" / "output" / "dreambooth"
    return environment.get("OUTPUT_DIR") or str(folder if index is None else folder / name)


def control_output(environment: Mapping[str, str]) -> str:
    """The run's folder: OUTPUT_DIR, or the one below data/output."""
    return environment.get("OUTPUT_DIR") or str(ROOT / "data" / "output" / "controlnet")


def model_name(environment: Mapping[str, str], more: Sequence[str]) -> str:
    """The base model: that of the flag in `more`, else of MODEL_NAME, else the embedded one."""
    return flag_in(more, "--pretrained_model_name_or_path") or environment.get("MODEL_NAME") or EMBEDDED_BASE


def flag_in(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag on a command line, as --flag=value or --flag value. None if the flag is not there."""
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]
    values += [value for before, value in itertools.pairwise(arguments) if before == flag]
    return values[-1] if values else None


def is_embedded(model: str) -> bool:
    """Whether a model is the embedded base, by whatever path; a name on the hub never is."""
    return os.path.exists(model) and os.path.samefile(model, EMBEDDED_BASE)


def recipe(trainer: str, model: str) -> str:
    """The name of the recipe that fits a base model. trainer: dreambooth or controlnet."""
    return f"{trainer}{'-embedded' if is_embedded(model) else ''}"


def launch_command(environment: Mapping[str, str]) -> list[str]:
    """The words before a trainer's script: Python alone, or `accelerate launch` where it is configured.

    ACCELERATE holds flags for it, which also ask for it where it is not configured.
    """
    flags, home = environment.get("ACCELERATE"), environment.get("HF_HOME")
    cache = Path(home) if home else Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    if not flags and not (cache / "accelerate" / "default_config.yaml").is_file():
        return [sys.executable]
    words = shlex.split(flags or "", posix=os.name == "posix")
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def threads(environment: Mapping[str, str], model: str) -> dict[str, str]:
    """The variable OMP_NUM_THREADS for training on the embedded base: as many as there are cores, at most 8.

    Empty where the user has set it, or for other models, for which torch chooses.
    """
    if environment.get("OMP_NUM_THREADS") or not is_embedded(model):
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"OMP_NUM_THREADS": str(min(MOST_THREADS, cores or 1))}


def check_scored(index: int | None, environment: Mapping[str, str], more: Sequence[str]) -> None:
    """Check that the embedded judge knows the subject that is to be trained, before the training.

    Raises:
        InputError: if it does not.
    """
    given = "the subject of an index" if index is not None else environment.get("INSTANCE_DIR") or flag_in(
        more, "--instance_data_dir"
    )  # fmt: skip
    if given:
        raise InputError(
            f"{given}: only embedded subjects can be scored by their judge; add --only_train, and see "
            "scripts/evaluate.py dreambooth for scores of others"
        )


def _from_variables(variables: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    flags = []
    for name, flag in variables.items():
        if environment.get(name):
            flags += [f"{flag}={environment[name]}", *([INSTEAD[name]] if name in INSTEAD else [])]
    return flags


def _attention(model: str) -> list[str]:
    """The flag for xformers' attention, for large models on a GPU where xformers is installed."""
    if is_embedded(model) or subprocess.run([sys.executable, "-c", XFORMERS], stderr=subprocess.DEVNULL).returncode:
        return []
    return ["--enable_xformers_memory_efficient_attention"]
