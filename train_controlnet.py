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

import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.run.launch import launch
from finetuning.settings.control import ControlNetConfig

if __name__ == "__main__":
    config = launch(ControlNetConfig, __doc__)

import torch
from PIL import Image

from finetuning.builders import begin, build_base, build_hub, build_sampler, build_training
from finetuning.control.builders import build_control, build_detectors, build_streams, check_base, read_validation
from finetuning.control.card import write_card
from finetuning.control.conditions import show_condition
from finetuning.control.consistency import consistency, overlay, plot_scores, references
from finetuning.control.network import CONTROL_PARTS, predict
from finetuning.control.sampler import ControlSampler
from finetuning.control.stream import ControlBatch, ControlBatches
from finetuning.dataset.stream import read_prompts
from finetuning.errors import InputError
from finetuning.files import save_picture
from finetuning.objective.diffusion import mean_squared_error
from finetuning.pictures.grid import grid
from finetuning.randomness import seed_modules
from finetuning.readings import to_device
from finetuning.run_folder import COMPARISON, COURSE, METRICS, VALIDATION, read_metrics
from finetuning.settings.reading import read_config, run_command
from finetuning.settings.types import required
from finetuning.training.training import Losses
from finetuning.training.validation import draw_validation
from toyworld.controls import Controls
from toyworld.segmentation import load_segmentation

SHOWN = 8  # held-out samples in a grid


def main(argv: Sequence[str] | None = None) -> int:
    return ControlNet(read_config(ControlNetConfig, argv, __doc__)).train()


class ControlNet:
    """One run: `ControlNet(config)` finds what is wrong with the input, `train()` does the work."""

    def train(self) -> int:
        """Teach the control; returns the exit code."""
        training, data, validation = self.training, self.config.data, self.config.validation
        self.prepare()
        if training.first_step == 0 and self.run.is_main:
            self.validate(0)  # where the scores begin
        for step, batches in training.steps(ControlBatches([self.stream], self.B), data.dataloader_num_workers):
            for batch in batches:  # this process's share of an optimizer step
                with training.accumulate():
                    errors = self.errors(batch, self.base.process.times(self.seed, batch.keys))  # (B,)
                    training.backward(Losses(errors.mean()))
            training.step()
            training.save_if_due()
            if training.is_due(validation.validation_steps):
                with training.averaged():
                    self.validate(step)
        return training.finish(self.results)

    def errors(self, batch: ControlBatch, t: torch.Tensor) -> torch.Tensor:
        """The weighted error of what is predicted, by the control, for each of B samples at its time, (B,)."""
        training, base, process = self.training, self.base, self.base.process
        # Latents of B images, and what conditions them: prompts, and controls (B, channels, H, W):
        x0, condition = training.encoding.latents(batch), training.encoding.condition(batch)
        control = to_device(batch.conditions, x0.device, x0.dtype)

        # Noise them, predict by the control, compare:
        noise = process.noise(x0, self.seed, batch.keys)  # (B, C, h, w)
        x_t = process.noised(x0, noise, t)
        predicted = predict(base, training.denoiser, training.module(self.part), x_t, t, condition, control)
        return process.weight(t) * mean_squared_error(predicted, process.target(x0, noise, t))

    # Before the first step

    def __init__(self, config: ControlNetConfig):
        """Load and check everything; nothing is written.

        Raises:
            InputError: with everything that is wrong.
        """
        self.output, self.seed = Path(config.checkpoints.output_dir), config.optimization.seed
        self.B, self.part = config.optimization.train_batch_size, CONTROL_PARTS[config.kind]

        # Processes and base model:
        self.run, base, config = build_base(config)
        self.base = check_base(base)
        self.config = config = config.with_values(
            dataset_name=config.data.dataset_place,
            validation_prompt=read_prompts(config.validation.validation_prompt, "--validation_prompt"),
        )
        data, validation, channels = config.data, config.validation, config.control.conditioning_channels
        resolution = required(data.resolution, "--resolution")

        # Images, controls, prompts; and what finds the controls again:
        self.stream, self.held_out_stream = build_streams(data, channels, self.seed, Controls)
        self.stream.check()
        self.held_out_stream.check()
        self.base.check_captions(self.stream.captions() + self.held_out_stream.captions(), data.long_captions)
        self.shown = None
        if validation.validation_image:
            self.base.check_prompts(validation.validation_prompt, "--validation_prompt")
            self.shown = read_validation(
                validation.validation_image, validation.validation_prompt, channels, resolution
            )
        if data.cache_latents and not self.stream.is_cacheable():
            raise InputError("--cache_latents: the random crops of oblong images cannot be kept; add --center_crop")
        self.detectors = build_detectors(data, load_segmentation, self.run.device)

        # What is trained, and where it begins:
        seed_modules(self.seed, "initial weights")
        self.adapters = build_control(self.base, config)
        rate = config.control.control_learning_rate
        self.training = build_training(
            self.run,
            self.base,
            self.adapters,
            config,
            images=self.stream.size or 0,
            data=self.stream.fingerprint(),
            data_flag="--train_data_dir" if data.train_data_dir else "--dataset_name",
            rates={} if rate is None else {self.part: rate},
        )
        precision, scale = self.run.dtype, validation.controlnet_conditioning_scale
        sampler = build_sampler(self.base, validation, resolution, validation.sample_batch_size, precision)
        self.sampler = ControlSampler.made_of(sampler, self.adapters[self.part].module, scale)
        self.hub = build_hub(config.tracking, self.output)
        self.run.wait()  # nobody writes before all have looked

    def prepare(self) -> None:
        """Open the folder, and compute once what never changes."""
        data, stream, encoding = self.config.data, self.stream, self.training.encoding
        images = "images without an end" if stream.size is None else f"{stream.size:,} images"
        begin(self.training, self.config, self.config.kind, images)
        self.held_out = self.held_out_stream.fixed()
        self.real = self.held_out.pictures()
        self.wanted = references(self.detectors, data.control_kind, self.held_out.conditions, self.real)
        if data.cache_latents:
            stream.cache(self.base.moments)
        if data.pre_compute_text_embeddings:
            prompts = [stream.source[index][2] for index in stream.chosen()]
            encoding.keep(["", *prompts, *self.held_out.prompts])
        self.training.wrap_modules()

    # On the way, and at the end, in the first process

    def validate(self, step: int) -> None:
        """The loss on fixed noise and times, how held-out controls are followed, and pictures by them."""
        batch, validation = self.held_out, self.config.validation
        with self.training.measuring():
            loss = self.errors(batch, self.base.process.spread_times(len(batch.keys))).mean()
        pictures = self.sampler(batch.prompts, self.seed, batch.keys, batch.conditions)
        found = consistency(pictures, self.wanted, self.detectors)
        self.run.log(step, held_out_loss=loss.item(), **found.scores)
        plot_scores(read_metrics(self.output / METRICS), found.scores, self.output / VALIDATION / COURSE)
        self.run.log_picture(step, "held-out", self.picture(pictures))
        if self.shown:
            conditions, prompts = self.shown
            above = [[show_condition(condition) for condition in conditions]]
            rows = validation.num_validation_images
            picture = draw_validation(self.sampler, prompts, self.seed, rows, conditions, above)
            self.run.log_picture(step, "validation", picture)

    def picture(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """Control, result and overlay of the first held-out samples."""
        conditions, prompts = self.held_out.conditions[:SHOWN], self.held_out.prompts[:SHOWN]
        controls, results = [show_condition(c) for c in conditions], list(pictures[:SHOWN])
        overlays = [overlay(image, c, side=controls[0].width) for image, c in zip(results, conditions)]
        return grid([controls, results, overlays], columns=prompts, captions=["control", "result", "overlay"])

    def results(self, step: int) -> None:
        """Write hint encoder or ControlNet and the adapter, a card, and a picture of held-out controls."""
        for name, adapter in self.adapters.items():
            if name == "controlnet":  # where diffusers' script has it
                adapter.save(self.output)
        self.training.write_adapters(self.output, but=("controlnet",))
        batch, path = self.held_out, self.output / COMPARISON
        pictures = self.sampler(batch.prompts[:SHOWN], self.seed, batch.keys[:SHOWN], batch.conditions[:SHOWN])
        save_picture(self.picture(pictures), path)
        self.run.say(f"controls, results, overlays: {path}")
        write_card(self.output, self.config, self.base.name, self.training, path)
        if self.hub:
            self.run.say(f"uploaded: {self.hub.upload(self.output)}")


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: ControlNet(config).train()))
