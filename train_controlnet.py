#!/usr/bin/env python
"""ControlNet (arXiv 2302.05543) or its light form (arXiv 2306.07280): make Stable Diffusion follow a control image.

A control image (edges, a mask, …) goes into the UNet beside the prompt: through a hint encoder of eight convolutions,
to which BOFT or LoRA adapts the UNet, or through a ControlNet, a trained copy of the UNet's encoder.

    python train_controlnet.py --dataset_name=toyworld --conditioning=edges --controlnet=light \\
        --use_boft --boft_block_size=8 --boft_n_butterfly_factor=2 --learning_rate=1e-3 --max_train_steps=500

Every random number follows from --seed. To go on after an interruption, run the same command with
--resume_from_checkpoint=latest.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.control_settings import ControlNetConfig
from finetuning.launch import launch
from finetuning.settings import SCHEDULES_WITHOUT_END

if __name__ == "__main__":
    config = launch(ControlNetConfig, __doc__)

import torch
from PIL import Image

from finetuning.averages import Averages, applied
from finetuning.builders import build_base, build_hub, build_optimizer, build_run, build_sampler, build_trackers
from finetuning.checkpoint import Checkpoints, write_folder
from finetuning.config import InputError, read_config, run_command
from finetuning.control import PARTS, predict
from finetuning.control_builders import build_control, build_detectors, build_streams, read_validation
from finetuning.control_card import control_card
from finetuning.control_conditions import show_condition
from finetuning.control_data import ControlBatch, ControlBatches
from finetuning.control_evaluation import consistency, overlay, plot_course, references
from finetuning.dataset import read_prompts, to_image
from finetuning.objective import add_noise, mean_squared_error, min_snr_weight, offset_noise, target
from finetuning.picture import grid, save_picture
from finetuning.randomness import integers, normal, seed_modules
from finetuning.report import read_metrics
from finetuning.run import DTYPES, METRICS
from finetuning.sampling import evaluating
from finetuning.state import TrainingState
from finetuning.text_file import write
from toyworld.controls import Controls
from toyworld.segmentation import load_segmentation

SHOWN = 8  # held-out samples in a grid


def main(argv: Sequence[str] | None = None) -> int:
    return ControlNet(read_config(ControlNetConfig, argv, __doc__)).train()


class ControlNet:
    """One run: `ControlNet(config)` finds what is wrong with the input, `train()` does the work."""

    def train(self) -> int:
        """Teach the control; returns the exit code."""
        config, run, base, seed, B = self.config, self.run, self.base, self.seed, self.B
        self.prepare()
        unet, control, optimizer = self.share()
        numbers = run.batch_numbers(self.first_step, self.last_step)
        batches = zip(numbers, ControlBatches([self.stream], B).load(numbers, config.data.dataloader_num_workers))

        step = self.first_step
        if step == 0 and run.is_main:
            self.validate(step)  # where the scores begin
        for step in run.steps(self.first_step, self.last_step):
            loss = torch.zeros(1, device=run.device)
            for number, batch in itertools.islice(batches, run.accumulation):
                with run.accumulate(number, unet, control):
                    # Latents of B images, and their prompts:
                    x0 = base.encode_images(batch.images, seed, batch.keys)  # (B, C, h, w)
                    text = self.encode_prompts(batch.prompts)  # (B, tokens, width)
                    t = integers(len(base.alpha_bar), seed, "timestep", batch.keys).to(run.device)  # (B,)

                    # Noise them, predict by the control, compare:
                    errors = self.denoising_errors(unet, control, x0, t, text, batch)  # (B,)
                    run.backward(errors.mean())
                    loss += errors.mean().detach() / run.accumulation

            gradient_norm = run.clip_gradients(optimizer, config.optimization.max_grad_norm)
            learning_rate = self.schedule.get_last_lr()[0]
            optimizer.step()
            self.schedule.step()
            optimizer.zero_grad()
            if self.averages is not None:
                self.averages.step()

            self.log(step, loss, gradient_norm, learning_rate)
            if step % config.checkpoints.checkpointing_steps == 0 or run.is_stopping():
                run.check_same(optimizer)
                if run.is_main:
                    self.checkpoints.save(step, self.state)
                run.wait()
            if step % config.validation.validation_steps == 0 and run.is_main:
                with applied(self.averages):
                    self.validate(step)

        run.check_same(optimizer)
        if run.is_main and not run.exit_code:
            with applied(self.averages), self.checkpoints.mentioned(step):
                self.finish(step)
        run.close()
        return run.exit_code

    def denoising_errors(
        self,
        unet: torch.nn.Module,
        control: torch.nn.Module,
        x0: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        batch: ControlBatch,
    ) -> torch.Tensor:
        """The weighted error of what is predicted for each sample, (B,).

        x0: latents (B, C, h, w); t: timesteps (B,); text: of the prompts (B, tokens, width); batch: its keys decide
        the noise, its conditions (B, channels, H, W) the control.
        """
        base, objective = self.base, self.config.objective
        alpha_bar = base.alpha_bar[t]
        noise = normal(x0.shape[1:], self.seed, "noise", batch.keys).to(x0)
        if objective.offset_noise:
            shift = normal(x0.shape[1:2], self.seed, "offset", batch.keys).to(x0)
            noise = offset_noise(noise, shift, objective.offset_noise)
        x_t = add_noise(x0, noise, alpha_bar)
        predicted = predict(unet, control, x_t, t, text, batch.conditions.to(x0))
        errors = mean_squared_error(predicted, target(x0, noise, alpha_bar, base.prediction_type))
        if objective.snr_gamma is not None:
            errors = errors * min_snr_weight(alpha_bar, objective.snr_gamma, base.prediction_type)
        return errors

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, tokens, width)."""
        if self.embedded is None:
            return self.base.encode_prompts(prompts)
        return torch.stack([self.embedded[prompt] for prompt in prompts])

    # Before the first step

    def __init__(self, config: ControlNetConfig):
        """Load and check everything; nothing is written.

        Raises:
            InputError: with what is wrong.
        """
        self.output, self.seed = Path(config.checkpoints.output_dir), config.optimization.seed
        self.B = config.optimization.train_batch_size

        # Processes and base model:
        self.run = build_run(config.model, config.optimization, config.tracking, self.output)
        self.base = build_base(config.model, config.objective, self.run)
        self.config = config = config.with_values(
            resolution=self.base.check_resolution(config.data.resolution),
            dataset_name=config.data.dataset_place,
            validation_prompt=read_prompts(config.validation.validation_prompt, "--validation_prompt"),
        )
        data, validation, channels = config.data, config.validation, config.control.conditioning_channels
        fingerprint = self.base.fingerprint

        # Images, controls, prompts; and what finds the controls again:
        self.stream, self.held_out_stream = build_streams(data, channels, self.seed, Controls)
        self.stream.check()
        self.held_out_stream.check()
        self.shown = None
        if validation.validation_image:
            self.base.check_prompts(validation.validation_prompt, "--validation_prompt")
            self.shown = read_validation(
                validation.validation_image, validation.validation_prompt, channels, data.resolution
            )
        if data.cache_latents and not self.stream.is_cacheable():
            raise InputError("--cache_latents: the random crops of oblong images cannot be kept; add --center_crop")
        self.detectors = build_detectors(data, load_segmentation, self.run.device)

        # What is trained, and by what:
        seed_modules(self.seed, "initial weights")
        self.adapters = build_control(self.base, config)
        self.control = self.adapters[PARTS[config.kind]].module
        self.total_batch = self.B * self.run.accumulation * self.run.processes
        self.last_step = config.optimization.steps(self.stream.size or 0, self.total_batch)
        rate = config.control.control_learning_rate
        self.optimizer, self.schedule = build_optimizer(
            self.adapters,
            config.optimization,
            scale_rate=config.adapter.boft_scale_learning_rate,
            steps=self.last_step,
            total_batch=self.total_batch,
            rates={} if rate is None else {PARTS[config.kind]: rate},
        )
        self.averages = None
        if config.averages.use_ema:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.averages = Averages(trained, config.averages.ema_decay)
        self.sampler = build_sampler(
            self.base, validation, data.resolution, validation.sample_batch_size, DTYPES[config.model.mixed_precision]
        ).controlled(self.control, validation.controlnet_conditioning_scale)

        # Where it begins:
        self.state = TrainingState(
            self.adapters,
            self.optimizer,
            self.schedule,
            config,
            weights=fingerprint,
            data=self.stream.fingerprint(),
            data_flag="--train_data_dir" if data.train_data_dir else "--dataset_name",
            total_batch=self.total_batch,
            scaler=self.run.scaler,
            averages=self.averages,
        )
        self.checkpoints = Checkpoints(self.output, config.checkpoints.checkpoints_total_limit)
        found = self.checkpoints.choose(
            config.checkpoints.resume_from_checkpoint, config.checkpoints.overwrite_output_dir
        )
        is_endless = config.optimization.lr_scheduler in SCHEDULES_WITHOUT_END
        may_change = ("max_train_steps",) if is_endless else ()
        self.first_step = self.state.read(found, self.last_step, may_change) if found else 0
        self.hub = build_hub(config.tracking, self.output)

    def prepare(self) -> None:
        """Open the folder, and compute once what never changes."""
        config, run, base = self.config, self.run, self.base
        if run.is_main:
            self.checkpoints.begin(is_new=self.first_step == 0)
        run.open(self.output, config, self.first_step, self.state.weights)
        build_trackers(run, config.tracking, config, self.first_step)
        trained = " and ".join(f"{adapter.count():,} of the {name}" for name, adapter in self.adapters.items())
        images = "unlimited" if self.stream.size is None else f"{self.stream.size:,}"
        run.say(
            f"{trained} are trained on {images} images, batch {self.total_batch}, "
            f"steps {self.first_step} to {self.last_step}, {run.device}, {run.dtype}"
        )
        if config.objective.rescale_betas_zero_snr:
            base.rescale_to_zero_terminal_snr()

        self.held_out = self.held_out_stream.fixed(self.held_out_stream.size)
        self.real = [to_image(pixels) for pixels in self.held_out.images[0].pixels]
        self.wanted = references(self.detectors, config.data.control_kind, self.held_out.conditions, self.real)
        if config.data.cache_latents:
            self.stream.cache(base.moments)
        self.embedded = None
        if config.data.pre_compute_text_embeddings:
            prompts = [self.stream.source[index][2] for index in self.stream.chosen(self.stream.size)]
            self.embedded = base.embed(["", *prompts, *self.held_out.prompts])

    def share(self) -> tuple[torch.nn.Module, torch.nn.Module, torch.optim.Optimizer]:
        """UNet, control and optimizer as the processes share them."""
        prepare = self.run.accelerator.prepare_model
        unet, control = prepare(self.base.unet), prepare(self.control)
        if "unet" in self.adapters:
            unet.train()
        control.train()
        return unet, control, self.run.accelerator.prepare_optimizer(self.optimizer)

    # Between the steps, in the first process

    def log(self, step: int, loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float) -> None:
        """Numbers of a step. The mean over processes is taken here, so all of them must call."""
        is_rare = step % 50 == 0 or step == self.last_step
        angle = self.adapters["unet"].rotation_angle() if is_rare and "unet" in self.adapters else None
        self.run.log(
            step,
            loss=self.run.mean(loss)[0],
            learning_rate=learning_rate,
            gradient_norm=float(gradient_norm),
            images_per_second=self.total_batch / self.run.seconds,
            peak_memory_gib=self.run.peak_memory(),
            rotation_degrees=angle,
        )

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """The loss on fixed noise and timesteps, how held-out controls are followed, and pictures by them."""
        base, batch, validation = self.base, self.held_out, self.config.validation
        n, T = len(batch.keys), len(base.alpha_bar)
        with evaluating(base.unet, self.control), self.run.autocast():
            t = torch.arange(n, device=self.run.device) * T // n + T // (2 * n)  # one from each n-th of the schedule
            x0 = base.encode_images(batch.images, self.seed, batch.keys)
            text = self.encode_prompts(batch.prompts)
            errors = self.denoising_errors(base.unet, self.control, x0, t, text, batch)
        pictures = self.sampler(batch.prompts, self.seed, batch.keys, batch.conditions)
        found = consistency(pictures, self.wanted, self.detectors)
        self.run.log(step, held_out_loss=errors.mean().item(), **found.scores)
        plot_course(read_metrics(self.output / METRICS), found.scores, self.output / "validation" / "consistency.png")
        self.run.log_picture(step, "held-out", self.picture(pictures))
        if self.shown:
            conditions, prompts = self.shown
            rows = [
                self.sampler(prompts, self.seed, [f"validation/{row}/{i}" for i in range(len(prompts))], conditions)
                for row in range(validation.num_validation_images)
            ]
            controls = [show_condition(condition) for condition in conditions]
            self.run.log_picture(step, "validation", grid([controls, *rows], columns=prompts))

    def picture(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """Control, result and overlay of the first held-out samples."""
        conditions, prompts = self.held_out.conditions[:SHOWN], self.held_out.prompts[:SHOWN]
        controls, results = [show_condition(c) for c in conditions], list(pictures[:SHOWN])
        overlays = [overlay(image, c, side=controls[0].width) for image, c in zip(results, conditions)]
        return grid([controls, results, overlays], columns=prompts, captions=["control", "result", "overlay"])

    def finish(self, step: int) -> None:
        """Write hint encoder or ControlNet and the adapter, a card, and a picture of held-out controls."""
        config = self.config
        for name, adapter in self.adapters.items():
            if name == "controlnet":  # where diffusers' script has it
                adapter.save(self.output)
            else:
                write_folder(self.output / name, adapter.save, adapter.size())
        batch, path = self.held_out, self.output / "comparison.png"
        pictures = self.sampler(batch.prompts[:SHOWN], self.seed, batch.keys[:SHOWN], batch.conditions[:SHOWN])
        save_picture(self.picture(pictures), path)
        self.run.say(f"controls, results, overlays: {path}")
        card = control_card(
            base=self.base.name,
            folder=str(self.output),
            control=config.kind,
            adapter=config.adapter.kind if config.uses_adapter else None,
            facts={
                "control": config.kind,
                "trained numbers": f"{sum(a.count() for a in self.adapters.values()):,}",
                "steps": step,
                "batch": self.total_batch,
                "learning rate": config.optimization.learning_rate,
                "resolution": config.data.resolution,
                "seed": self.seed,
            },
            picture=path.name,
        )
        write(self.output / "README.md", card)
        if self.hub:
            self.run.say(f"uploaded: {self.hub.upload(self.output)}")


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: ControlNet(config).train()))
