"""From the settings that all trainers have to objects. The two doors are `build_base` and then `build_training`.

Between the two a trainer reads its data and puts its adapters on the base. Nothing is written before `begin`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch.optim.lr_scheduler import LRScheduler

from finetuning.adapters.adapter import Adapter, add_boft, add_lora, train_fully
from finetuning.errors import InputError
from finetuning.models.attention import choose_attention
from finetuning.models.family import Family
from finetuning.models.registry import load_family
from finetuning.models.schedulers import check_steps
from finetuning.models.unet_layers import UNET_PRESETS
from finetuning.objective.flow import Flow
from finetuning.pictures.sampler import Sampler
from finetuning.publishing.hub import HubRepository, open_repository
from finetuning.run.run import Run
from finetuning.run.trackers import Tracker, start_trackers, tracker_names
from finetuning.run_folder import CONFIG
from finetuning.settings.adapter import AdapterSettings
from finetuning.settings.dreambooth import DreamBoothAdapterSettings
from finetuning.settings.folders import check_writable
from finetuning.settings.shared import (
    SCHEDULES_WITHOUT_END,
    ModelSettings,
    ObjectiveSettings,
    OptimizationSettings,
    TrackerSettings,
    TrainerConfig,
    ValidationSettings,
)
from finetuning.training.averages import Averages
from finetuning.training.checkpoint import Checkpoints
from finetuning.training.optimizer import RATE_NAME, make_optimizer, make_schedule
from finetuning.training.state import TrainingState
from finetuning.training.training import Training

C = TypeVar("C", bound=TrainerConfig)
DIFFUSION_FLAGS = ("snr_gamma", "offset_noise", "rescale_betas_zero_snr")
FLOW_FLAGS = ("timestep_sampling", "logit_mean", "logit_std", "loss_weighting")


def build_base(config: C) -> tuple[Run, Family, C]:
    """Join the processes of the run and load the frozen base model onto their device.

    Returns:
        The processes, the base, and the settings with --mixed_precision and --resolution resolved.

    Raises:
        InputError: if the output folder cannot be written, a tracker is not installed, the processes cannot be joined,
            the base cannot be loaded, or the settings do not fit it.
    """
    check_writable(Path(config.checkpoints.output_dir), "--output_dir")
    tracker_names(config.tracking.report_to)
    model, objective = config.model, config.objective
    run = Run(
        seed=config.optimization.seed,
        accumulation=config.optimization.gradient_accumulation_steps,
        mixed_precision=model.mixed_precision,
        allow_tf32=model.allow_tf32,
    )
    base = load_model(model)
    set_objective(base, objective)
    base.freeze(run.dtype, run.device)
    choose_attention(base.part(base.denoiser_part), run.device, model.enable_xformers_memory_efficient_attention)
    resolution = base.check_resolution(config.data.resolution)
    return run, base, config.with_values(mixed_precision=run.mixed_precision, resolution=resolution)


def load_model(settings: ModelSettings) -> Family:
    """The base model that the settings name, as it was published. Raises InputError where it cannot be trained."""
    return load_family(
        settings.pretrained_model_name_or_path,
        settings.revision,
        settings.variant,
        tokenizer_name=settings.tokenizer_name,
        prediction_type=settings.prediction_type,
        allow_distilled=settings.allow_distilled,
    )


def set_objective(base: Family, settings: ObjectiveSettings) -> None:
    """Let the base's process draw times and noise, and weigh errors, as the settings say.

    Raises:
        InputError: a setting that means nothing for this model; names each of them.
    """
    process, defaults = base.process, ObjectiveSettings()
    is_flow = isinstance(process, Flow)
    other = DIFFUSION_FLAGS if is_flow else FLOW_FLAGS
    reason = "is trained by flow matching" if is_flow else "is trained by diffusion, not by flow matching"
    faults = [
        f"--{name}={value}: has no effect on {base.name}, which {reason}; drop the flag"
        for name in other
        if (value := getattr(settings, name)) != getattr(defaults, name)
    ]
    if settings.embedded_guidance is not None and not base.is_told_guidance:
        faults.append(
            f"--embedded_guidance={settings.embedded_guidance:g}: {base.name} is not told a guidance scale, as "
            "FLUX.1-dev is; drop the flag"
        )
    if faults:
        raise InputError(*faults)
    if isinstance(process, Flow):
        base.process = _flow_by(process, settings)
    else:
        base.process = replace(process, snr_gamma=settings.snr_gamma, noise_offset=settings.offset_noise)
        if settings.rescale_betas_zero_snr and process.prediction != "v_prediction":
            raise InputError(
                f"--rescale_betas_zero_snr: the model predicts {process.prediction}, which says nothing about pure "
                "noise; use a v-prediction model or drop the flag"
            )
    if settings.embedded_guidance is not None:
        base.guidance = settings.embedded_guidance


def _flow_by(process: Flow, settings: ObjectiveSettings) -> Flow:
    """Flow matching as the settings say; None leaves what the family has. Raises InputError, see `set_objective`."""
    changes = {
        "sampling": settings.timestep_sampling, "mean": settings.logit_mean, "std": settings.logit_std,
        "weighting": settings.loss_weighting,
    }  # fmt: skip
    process = replace(process, **{name: value for name, value in changes.items() if value is not None})
    for name in ("logit_mean", "logit_std"):
        if getattr(settings, name) is not None and process.sampling != "logit-normal":
            raise InputError(
                f"--{name}={getattr(settings, name):g}: has no effect on {process.sampling} times; add "
                "--timestep_sampling=logit-normal or drop this flag"
            )
    return process


def build_adapters(
    base: Family, settings: DreamBoothAdapterSettings, gradient_checkpointing: bool
) -> dict[str, Adapter]:
    """What --use_boft, --use_lora, or neither put on the denoiser and, if they are trained, on the text encoders.

    Raises:
        InputError: no such layers, or text encoders that are not trained in this family.
    """
    denoiser, encoders = base.part(base.denoiser_part), base.encoder_parts if settings.train_text_encoder else ()
    if settings.train_text_encoder and not encoders:
        raise InputError(
            f"--train_text_encoder: the text encoder of {base.name} is a language model, which is not trained; drop "
            "the flag"
        )
    adapters = {base.denoiser_part: build_adapter(denoiser, settings, base.presets)}
    both = {
        name: [*base.presets[name], *endings] for name, endings in UNET_PRESETS.items()
    }  # those name CLIP's layers
    for part in encoders:
        adapters[part] = build_adapter(base.part(part), settings, both)
    if gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        for part in encoders:
            base.part(part).gradient_checkpointing_enable()
    return adapters


def build_optimizer(
    adapters: dict[str, Adapter],
    settings: OptimizationSettings,
    *,
    scale_rate: float | None,
    steps: int,
    total_batch: int,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The optimizer over all adapters, and the schedule of its learning rates.

    Args:
        adapters: what is trained, by name.
        settings: of the optimization.
        scale_rate: learning rate of BOFT's scale s, logged as learning_rate_scale. None = as the rest.
        steps: optimizer steps of the run.
        total_batch: samples in an optimizer step, for --scale_lr.
        rates: learning rates of those adapters, by name, that have another one than --learning_rate. They are logged
            as learning_rate_NAME.

    Raises:
        InputError: if the warm-up is longer than the run, or 8-bit Adam is not installed.
    """
    factor, groups = total_batch if settings.scale_lr else 1, []
    for name, adapter in adapters.items():
        rate, called = rates.get(name, settings.learning_rate) * factor, "learning_rate"
        if name in rates:
            called += f"_{name}"
        for group in adapter.parameter_groups(rate, settings.adam_weight_decay, scale_rate):
            groups.append({**group, RATE_NAME: called if group["lr"] == rate else "learning_rate_scale"})
    optimizer = make_optimizer(
        groups,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        eight_bit=settings.use_8bit_adam,
    )
    if settings.lr_warmup_steps > steps:
        raise InputError(f"--lr_warmup_steps={settings.lr_warmup_steps}: more than the run's {steps} optimizer steps")
    schedule = make_schedule(
        optimizer,
        settings.lr_scheduler,
        steps=steps,
        warmup_steps=settings.lr_warmup_steps,
        cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )
    return optimizer, schedule


def build_sampler(
    base: Family, settings: ValidationSettings, resolution: int, batch_size: int, precision: torch.dtype
) -> Sampler:
    """The sampler of validation pictures.

    Raises:
        InputError: if more denoising steps are asked for than the model has, or than its scheduler can take.
    """
    most = base.scheduler.config.num_train_timesteps
    if settings.num_inference_steps > most:
        raise InputError(f"--num_inference_steps={settings.num_inference_steps}: the model has {most}; give fewer")
    check_steps(base.scheduler, settings.num_inference_steps)
    return Sampler(base, resolution, settings.num_inference_steps, settings.guidance_scale, batch_size, precision)


def build_training(
    run: Run,
    base: Family,
    adapters: dict[str, Adapter],
    config: TrainerConfig,
    *,
    images: int,
    data: str,
    data_flag: str,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> Training:
    """What trains the adapters, from the beginning or from where a checkpoint left off. Nothing is written.

    Args:
        run, base: as `build_base` returns them.
        adapters: what is trained, by the names of their modules.
        config: the settings of the run.
        images: how many an epoch has. 0 = there is no end to them.
        data: fingerprint of the images and captions; data_flag: the flag that names them, for messages.
        rates: learning rates of those adapters, by name, that have another one than --learning_rate.

    Raises:
        InputError: if the schedule, the output folder or the checkpoint does not fit this run.
    """
    optimization = config.optimization
    total_batch = optimization.train_batch_size * run.accumulation * run.processes
    last_step = optimization.steps(images, total_batch)
    optimizer, schedule = build_optimizer(
        adapters,
        optimization,
        scale_rate=config.adapter.boft_scale_learning_rate,
        steps=last_step,
        total_batch=total_batch,
        rates=rates,
    )
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    averages = Averages(trained, config.averages.ema_decay) if config.averages.use_ema else None
    state = TrainingState(
        adapters,
        optimizer,
        schedule,
        config,
        weights=base.fingerprint,
        data=data,
        data_flag=data_flag,
        total_batch=total_batch,
        scaler=run.scaler,
        averages=averages,
    )
    checkpoints, first_step = begin_where(state, config, last_step)
    return Training(
        run,
        base,
        state,
        checkpoints,
        first_step=first_step,
        last_step=last_step,
        checkpointing_steps=config.checkpoints.checkpointing_steps,
        max_grad_norm=optimization.max_grad_norm,
    )


def begin_where(state: TrainingState, config: TrainerConfig, last_step: int) -> tuple[Checkpoints, int]:
    """The checkpoints of the run, and the step after which it goes on; 0 = from the beginning.

    If the run is resumed, `state` is read from its checkpoint.
    """
    settings = config.checkpoints
    checkpoints = Checkpoints(Path(settings.output_dir), settings.checkpoints_total_limit)
    found = checkpoints.choose(settings.resume_from_checkpoint, settings.overwrite_output_dir)
    may_change = ("max_train_steps",) if config.optimization.lr_scheduler in SCHEDULES_WITHOUT_END else ()
    return checkpoints, state.read(found, last_step, may_change) if found else 0


def begin(training: Training, config: TrainerConfig, method: str, images: str) -> None:
    """Open the run's folder and trackers, and tell the user what is about to happen. From here on, files are written.

    Args:
        training: as `build_training` returns it.
        config: the settings of the run, which are recorded.
        method: how it is trained, in a word, for the line that the user reads.
        images: what it is trained on, for the same line, e.g. "5 photos".

    Raises:
        InputError: a tracker cannot be opened; what is in the folder stays as it was.
    """
    run, folder = training.run, training.checkpoints.folder
    if run.is_main:
        is_new = training.first_step == 0
        former = training.checkpoints.former_outputs(is_new)  # of another run, before this one's trackers write there
        trackers = build_trackers(config.tracking, config, folder, training.first_step)
        training.checkpoints.begin(is_new, former)
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / CONFIG)
        run.open_log(folder, trackers, training.first_step, training.state.weights)
    run.wait()
    trained = " and ".join(f"{adapter.count():,} of the {name}" for name, adapter in training.adapters.items())
    run.say(
        f"{method}: {trained} are trained on {images}, batch {training.total_batch}, "
        f"steps {training.first_step} to {training.last_step}, {run.device}, {run.dtype}"
    )
    if config.objective.rescale_betas_zero_snr:
        training.base.rescale_to_zero_terminal_snr()


def build_hub(settings: TrackerSettings, output_dir: Path) -> HubRepository | None:
    """The repository that --push_to_hub uploads the result to, or None without that flag.

    It is asked for after everything else has been checked, because asking may create it.
    """
    if not settings.push_to_hub:
        return None
    return open_repository(settings.hub_model_id, settings.hub_token, output_dir)


def build_trackers(settings: TrackerSettings, config: TrainerConfig, folder: Path, first_step: int) -> list[Tracker]:
    """The trackers that --report_to asks for, opened for a run in `folder`; only the first process needs them.

    Raises:
        InputError: a tracker cannot be opened.
    """
    return start_trackers(
        settings.report_to,
        folder=folder,
        logging_dir=settings.logging_dir,
        project=settings.tracker_project_name,
        name=settings.wandb_run_name or folder.name,
        configuration=config.as_dict(),
        first_step=first_step,
    )


def build_adapter(
    module: torch.nn.Module, settings: AdapterSettings, presets: Mapping[str, Sequence[str]] = UNET_PRESETS
) -> Adapter:
    """Put BOFT or LoRA on a module, or without either train all of its weights.

    presets: {preset: endings of layer names}, for presets among the flag's values.
    """
    if settings.use_boft:
        return add_boft(
            module,
            settings.boft_target_modules,
            block_size=settings.boft_block_size or 0,
            block_num=settings.boft_block_num or 0,
            factors=settings.boft_n_butterfly_factor,
            dropout=settings.boft_dropout,
            bias=settings.boft_bias,
            train_scale=settings.boft_scale_learning_rate != 0,
            presets=presets,
        )
    if settings.use_lora:
        return add_lora(
            module,
            settings.lora_target_modules,
            rank=settings.rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            presets=presets,
        )
    return train_fully(module)
