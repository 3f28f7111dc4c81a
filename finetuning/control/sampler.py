"""Pictures by control images, with the modules that are in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from finetuning.control.pipeline import control_pipeline
from finetuning.pictures.sampler import Sampler


@dataclass
class ControlSampler(Sampler):
    """How pictures are made by control images, whose conditions are tensors (N, channels, H, W) in [0, 1].

    Attributes:
        control: hint encoder or ControlNet that reads them; control_scale: its strength.
    """

    control: torch.nn.Module | None = None
    control_scale: float = 1.0

    @classmethod
    def made_of(cls, sampler: Sampler, control: torch.nn.Module, scale: float = 1.0) -> ControlSampler:
        """As another sampler draws, by control images."""
        return cls(**vars(sampler), control=control, control_scale=scale)

    def pipeline(self) -> DiffusionPipeline:
        return control_pipeline(self.base, self.control)

    def options(self, conditions: torch.Tensor | None) -> dict[str, Any]:
        return {"image": conditions, "controlnet_conditioning_scale": self.control_scale}
