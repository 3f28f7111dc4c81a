"""Pictures by control images, drawn with the modules that are in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from finetuning.control.pipeline import control_pipeline
from finetuning.pictures.sampler import Sampler


@dataclass
class ControlSampler(Sampler):
    """Draws pictures by control images, which are tensors (N, channels, H, W) in [0, 1].

    Attributes:
        control: the hint encoder or the ControlNet that reads them.
        control_scale: its strength.
    """

    control: torch.nn.Module | None = None
    control_scale: float = 1.0

    @classmethod
    def made_of(cls, sampler: Sampler, control: torch.nn.Module, scale: float = 1.0) -> ControlSampler:
        """A sampler with the settings of another one that draws by control images besides."""
        return cls(**vars(sampler), control=control, control_scale=scale)

    def pipeline(self) -> DiffusionPipeline:
        """The pipeline that draws, see `control_pipeline`."""
        if self.control is None:
            raise ValueError("control: a hint encoder or a ControlNet is needed")
        return control_pipeline(self.base, self.control)

    def options(self, conditions: torch.Tensor | None) -> dict[str, Any]:
        """The arguments of the pipeline for the controls of a batch."""
        return {"image": conditions, "controlnet_conditioning_scale": self.control_scale}
