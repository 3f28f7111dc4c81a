"""From the settings that all trainers have to objects. The two doors are `build_base` and then `build_training`.

Between the two a trainer reads its data and puts its adapters on the base. Nothing is written before `begin`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch.optim.lr_scheduler import LRScheduler

from finetuning.adapters.adapter import Adapter, add_boft, add_lora, train_fully
from finetuning.errors import InputError
from finetuning.models.attention import choose_attention
from finetuning.models.loading import load_stable_diffusion
from finetuning.models.schedulers import check_steps
from finetuning.models.stable_diffusion import StableDiffusion
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


def build_base(config: C) -> tuple[Run, StableDiffusion, C]:
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
    base = load_stable_diffusion(
        model.pretrained_model_name_or_path, model.revision, model.variant, model.tokenizer_name
    )
    if objective.rescale_betas_zero_snr and base.prediction_type != "v_prediction":
        raise InputError(
            f"--rescale_betas_zero_snr: the model predicts {base.prediction_type}, which says nothing about pure "
            "noise; use a v-prediction model or drop the flag"
        )
    base.freeze(run.dtype, run.device)
    choose_attention(base.unet, run.device, model.enable_xformers_memory_efficient_attention)
    base.process = replace(base.process, snr_gamma=objective.snr_gamma, noise_offset=objective.offset_noise)
    resolution = base.check_resolution(config.data.resolution)
    return run, base, config.with_values(mixed_precision=run.mixed_precision, resolution=resolution)


def build_adapters(
    base: StableDiffusion, settings: DreamBoothAdapterSettings, gradient_checkpointing: bool
) -> dict[str, Adapter]:
    """The adapters on the UNet and, if it is trained, on the text encoder, by part.

    They are BOFT, LoRA, or with neither flag all weights.
    """
    adapters = {"unet": build_adapter(base.unet, settings)}
    if settings.train_text_encoder:
        adapters["text_encoder"] = build_adapter(base.text_encoder, settings)
    if gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        if settings.train_text_encoder:
            base.text_encoder.gradient_checkpointing_enable()
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
    base: StableDiffusion, settings: ValidationSettings, resolution: int, batch_size: int, precision: torch.dtype
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
    base: StableDiffusion,
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
        trackers = build_trackers(config.tracking, config, folder, training.first_step)
        training.checkpoints.begin(is_new=training.first_step == 0)
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


def build_adapter(module: torch.nn.Module, settings: AdapterSettings) -> Adapter:
    """Put BOFT or LoRA on a module, or without either train all of its weights."""
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
        )
    if settings.use_lora:
        return add_lora(
            module,
            settings.lora_target_modules,
            rank=settings.rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
        )
    return train_fully(module)
