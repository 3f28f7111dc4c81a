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
INSTEAD = {"BLOCK_SIZE": "--boft_block_num=0", "BLOCK_NUM": "--boft_block_size=0"}  # one follows from the other
XFORMERS = "import torch, xformers; assert torch.cuda.is_available()"
MOST_THREADS = 8  # more do not help a model of this size


def dreambooth_command(environment: Mapping[str, str], index: int | None, more: Sequence[str]) -> list[str]:
    """Flags of train_dreambooth.py that teach a subject.

    Args:
        environment: its variables replace what was found or is in the recipe.
        index: of a subject of google/dreambooth; None = the embedded one that SUBJECT names.
        more: further flags.

    Raises:
        InputError: there is no such subject.
    """
    get, model = environment.get, model_name(environment, more)
    if index is None:
        found = list(embedded_subject(get("SUBJECT") or DEFAULT_SUBJECT))
    else:
        found = list(dreambooth_subject(index, get("UNIQUE_TOKEN") or "qwe"))
    one = dict(found)  # of the keys that occur once
    of_class, of_validation, of_base = (
        [value for key, value in found if key == f"{kind}_prompt"] for kind in ("class", "validation", "base")
    )
    if get("CLASS_PROMPT"):
        of_class = [environment["CLASS_PROMPT"]]
    if get("VALIDATION_PROMPT"):
        of_validation, of_base = [environment["VALIDATION_PROMPT"]], []
    class_folder = ROOT / "data" / "class_images" / os.path.basename(os.path.abspath(model)) / one["name"]
    return [
        f"--recipe={recipe('dreambooth', model)}",
        f"--pretrained_model_name_or_path={model}",
        f"--instance_data_dir={get('INSTANCE_DIR') or one['instance_dir']}",
        f"--instance_prompt={get('INSTANCE_PROMPT') or one['instance_prompt']}",
        f"--class_data_dir={get('CLASS_DIR') or class_folder}",
        "--class_prompt", *of_class,
        "--validation_prompt", *of_validation,
        *(["--base_prompt", *of_base] if of_base else []),
        f"--output_dir={dreambooth_output(environment, index, one['name'])}", "--overwrite_output_dir",
        f"--report_to={'tensorboard' if index is None else 'wandb'}",  # wandb: offline where there is no key
        "--wandb_project_name=dreambooth", f"--wandb_run_name={one['name']}",
        *_from_variables(DREAMBOOTH_VARIABLES, environment),
        *_attention(model), *more,
    ]  # fmt: skip


def control_command(environment: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """Flags of train_controlnet.py that teach a light control; arguments as of `dreambooth_command`."""
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
    """The folder of the run."""
    folder = ROOT / "data" / "output" / "dreambooth"
    return environment.get("OUTPUT_DIR") or str(folder if index is None else folder / name)


def control_output(environment: Mapping[str, str]) -> str:
    """The folder of the run."""
    return environment.get("OUTPUT_DIR") or str(ROOT / "data" / "output" / "controlnet")


def model_name(environment: Mapping[str, str], more: Sequence[str]) -> str:
    """The base model that is meant; the embedded one where nobody says another."""
    return flag_in(more, "--pretrained_model_name_or_path") or environment.get("MODEL_NAME") or EMBEDDED_BASE


def flag_in(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag on a command line, --flag=value or --flag value; None = it is not there."""
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]
    values += [value for before, value in itertools.pairwise(arguments) if before == flag]
    return values[-1] if values else None


def is_embedded(model: str) -> bool:
    """Whether a path leads to the embedded base, however it is written; a name on the hub does not."""
    return os.path.exists(model) and os.path.samefile(model, EMBEDDED_BASE)


def recipe(trainer: str, model: str) -> str:
    """The name of the recipe that fits a base model. trainer: dreambooth or controlnet."""
    return f"{trainer}{'-embedded' if is_embedded(model) else ''}"


def launch_command(environment: Mapping[str, str]) -> list[str]:
    """How a trainer is started: by accelerate where that is configured, or where ACCELERATE holds flags for it."""
    flags, home = environment.get("ACCELERATE"), environment.get("HF_HOME")
    cache = Path(home) if home else Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    if not flags and not (cache / "accelerate" / "default_config.yaml").is_file():
        return [sys.executable]
    words = shlex.split(flags or "", posix=os.name == "posix")
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def threads(environment: Mapping[str, str], model: str) -> dict[str, str]:
    """OMP_NUM_THREADS for training; on the embedded base as many as there are cores, but no more than help."""
    if environment.get("OMP_NUM_THREADS") or not is_embedded(model):
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"OMP_NUM_THREADS": str(min(MOST_THREADS, cores or 1))}


def check_scored(index: int | None, environment: Mapping[str, str], more: Sequence[str]) -> None:
    """Raises InputError if the embedded judge will not know the subject that is to be trained."""
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
    """xformers' attention, on a GPU where it is installed."""
    if is_embedded(model) or subprocess.run([sys.executable, "-c", XFORMERS], stderr=subprocess.DEVNULL).returncode:
        return []
    return ["--enable_xformers_memory_efficient_attention"]
