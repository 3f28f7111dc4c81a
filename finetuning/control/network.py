"""Control of a UNet by an image: light, by a hint encoder, or full, by a ControlNet (arXiv 2302.05543).

The hint encoder is the light control of the orthogonal fine-tuning papers (arXiv 2306.07280, 2311.06243): eight
convolutions bring the control to the size of the latents, and what they give is added to the UNet's features after its
first convolution. The UNet itself learns to heed it, through an adapter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import ConfigMixin, ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from finetuning.errors import InputError
from finetuning.models.family import Condition
from finetuning.models.stable_diffusion import StableDiffusion

M = TypeVar("M", bound=ModelMixin)

WIDTHS = (16, 32, 96, 256)  # channels between the convolutions of the papers' encoder
SILU_GAIN = 1.68  # keeps the size of features from layer to layer; by torch's own default they would fade
CONTROL_PARTS = {"light": "hint_encoder", "full": "controlnet"}  # {kind of control: name of its module}


class HintEncoder(ModelMixin, ConfigMixin):
    """Eight convolutions from a control image to a hint for the UNet; a fresh one gives zero.

    Args:
        conditioning_channels: channels of the control.
        out_channels: channels of the UNet's first features.
        scale_factor: pixels along a side of one latent: 1, 2, 4 or 8. So many of the first convolutions that widen the
            features have strides of 2 as are needed for it.
        widths: channels of the features in between.

    Raises:
        ValueError: if the scale factor is another one.
    """

    @register_to_config
    def __init__(
        self,
        conditioning_channels: int = 3,
        out_channels: int = 320,
        scale_factor: int = 8,
        widths: Sequence[int] = WIDTHS,
    ):
        super().__init__()
        halvings = math.log2(scale_factor)
        if halvings not in range(len(widths)):
            raise ValueError(f"scale_factor={scale_factor}: must be a power of 2 up to {2 ** (len(widths) - 1)}")
        layers = [nn.Conv2d(conditioning_channels, widths[0], 3, padding=1)]
        layers += [nn.Conv2d(widths[0], widths[0], 3, padding=1)]
        for k, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Conv2d(narrow, wide, 3, stride=2 if k < halvings else 1, padding=1))
            layers.append(nn.Conv2d(wide, wide if k < len(widths) - 2 else out_channels, 3, padding=1))
        for layer in layers:
            nn.init.normal_(layer.weight, std=SILU_GAIN / math.sqrt(layer.weight[0].numel()))
            nn.init.zeros_(cast(torch.Tensor, layer.bias))
        nn.init.zeros_(layers[-1].weight)
        self.layers = nn.ModuleList(layers)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        """(B, conditioning_channels, H, W) in [0, 1] to (B, out_channels, H / scale_factor, W / scale_factor)."""
        x = condition
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


@contextmanager
def hinted(unet: nn.Module, hint: torch.Tensor, guess_mode: bool = False) -> Iterator[None]:
    """Add `hint` after the UNet's first convolution, for as long as the block lasts.

    Args:
        unet: is called with B samples, or with 2B for guidance, the unconditional ones first.
        hint: (B, C, h, w).
        guess_mode: whether the unconditional samples go without it.
    """

    def add(module: nn.Module, inputs: tuple[Any, ...], features: torch.Tensor) -> torch.Tensor:
        if len(features) == len(hint):
            return features + hint.to(features.dtype)
        if len(features) != 2 * len(hint):
            raise ValueError(f"the UNet is called with {len(features)} samples, the hint has {len(hint)}")
        unconditional = torch.zeros_like(hint) if guess_mode else hint
        return features + torch.cat([unconditional, hint]).to(features.dtype)

    handle = unet.get_submodule("conv_in").register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def cast_residuals(unet: UNet2DConditionModel) -> None:
    """Have the UNet cast a ControlNet's residuals to its own precision, for good.

    A ControlNet that is trained gives float32, while the frozen UNet may be in half precision. On a CPU their sum, in
    float32, would be an error in the UNet's next normalization.
    """

    def cast(
        module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtype = next(p.dtype for p in module.parameters() if not p.requires_grad)
        if (down := options.get("down_block_additional_residuals")) is not None:
            options["down_block_additional_residuals"] = [residual.to(dtype) for residual in down]
            options["mid_block_additional_residual"] = options["mid_block_additional_residual"].to(dtype)
        return arguments, options

    unet.register_forward_pre_hook(cast, with_kwargs=True)


def predict(
    base: StableDiffusion,
    unet: nn.Module,
    control: nn.Module,
    x_t: torch.Tensor,
    t: torch.Tensor,
    condition: Condition,
    image: torch.Tensor,
) -> torch.Tensor:
    """What the UNet predicts under its control, (B, C, h, w).

    Args:
        base: the model that the UNet belongs to.
        unet: as processes share it, or bare.
        control: the hint encoder or the ControlNet, likewise.
        x_t: noised latents, (B, C, h, w).
        t: their times, (B,).
        condition: of B prompts.
        image: the controls, (B, channels, H, W) in [0, 1].
    """
    if is_light(control):
        with hinted(_bare(unet), control(image)):
            return base.predict(unet, x_t, t, condition)
    arguments = base.arguments(condition)
    down, middle = control(x_t, t, controlnet_cond=image, **arguments, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return unet(x_t, t, **arguments, **residuals).sample


def is_light(control: nn.Module) -> bool:
    """Whether a control is a hint encoder, and not a ControlNet."""
    return isinstance(_bare(control), HintEncoder)


def new_hint_encoder(unet: UNet2DConditionModel, scale_factor: int, channels: int) -> HintEncoder:
    """A fresh hint encoder that fits a UNet.

    Args:
        unet: its first features give the number of output channels.
        scale_factor: pixels along a side of one latent.
        channels: of the controls.

    Raises:
        InputError: if eight convolutions cannot reduce an image by this factor.
    """
    try:
        return HintEncoder(channels, unet.config.block_out_channels[0], scale_factor)
    except ValueError as error:
        raise InputError(f"--controlnet=light: the model's latents are too small for it ({error})") from None


def new_controlnet(
    unet: UNet2DConditionModel, scale_factor: int, channels: int, name: str | None = None
) -> ControlNetModel:
    """A ControlNet that starts as a copy of the UNet's encoder; or the stored one of a folder or a name on the hub.

    Raises:
        InputError: if the stored one cannot be loaded, or was made for another UNet or for controls of other channels.
    """
    if name is None:
        return ControlNetModel.from_unet(
            unet, conditioning_channels=channels, conditioning_embedding_out_channels=_embedding_widths(scale_factor)
        )
    flag = f"--controlnet_model_name_or_path={name}"
    try:
        control = load_complete(ControlNetModel, name)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{flag}: cannot be loaded; is it a ControlNet's folder or name? {text}") from error
    for key in ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block"):
        theirs, ours = control.config[key], unet.config[key]
        if _plain(theirs) != _plain(ours):
            raise InputError(f"{flag}: has {key} {theirs}, the UNet {ours}; it belongs to another base model")
    if control.config.conditioning_channels != channels:
        raise InputError(
            f"--conditioning_channels={channels}: {name} takes controls of {control.config.conditioning_channels}; "
            "give that number"
        )
    return control


def load_complete(kind: type[M], place: str | Path) -> M:
    """Load a model of one of diffusers' classes, and refuse an incomplete one.

    The library itself would fill in random numbers for what is missing.

    Raises:
        ValueError: if tensors are missing or left over, or hold numbers that are not finite.
        OSError and others: if the model is not there or cannot be read.
    """
    model, report = kind.from_pretrained(place, output_loading_info=True)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(fault):
            raise ValueError(f"its weights do not fit its configuration: {fault} {sorted(map(str, report[fault]))[0]}")
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite; it is damaged")
    return model


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _embedding_widths(scale_factor: int) -> tuple[int, ...]:
    """Channels in a ControlNet's own encoder of the control, which halves the size between each two of them."""
    return WIDTHS[: int(math.log2(scale_factor)) + 1]


def _bare(module: nn.Module) -> nn.Module:
    """The module itself, behind the wrapping that exchanges gradients between processes."""
    return getattr(module, "module", module)
