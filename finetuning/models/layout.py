"""Checks of a base model: whether its UNet takes latents, a time and a prompt and nothing else, and which files of
weights its folder holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WEIGHTS = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)"
    r"(?:\.(?P<before>[\w-]+?))?(?:-\d+-of-\d+)?(?:\.(?P<after>[\w-]+))?\.(?:safetensors|bin)"
)
INPUTS = {  # settings by which a UNet takes further inputs, and the models that have them
    "class_embed_type": "class embeddings, as unCLIP and upscalers have them",
    "num_class_embeds": "class labels, as upscalers have them",
    "addition_embed_type": "further embeddings, as Stable Diffusion XL has them",
    "encoder_hid_dim_type": "further projections of the prompt, as Kandinsky and IP-Adapter have them",
    "time_cond_proj_dim": "the guidance scale, as latent consistency models have it",
}


def foreign_unet(
    unet: Mapping[str, Any], latent_channels: int, text_width: int, own_inputs: Sequence[str] = ()
) -> str | None:
    """Say in which way a UNet differs from those of Stable Diffusion.

    Args:
        unet: the UNet's configuration.
        latent_channels: the number of channels that the VAE gives.
        text_width: the width of the text encoder's hidden states.
        own_inputs: those of INPUTS that the family gives its UNet.

    Returns:
        A clause for an error message, or None if the UNet is of their kind.
    """
    for name, what in INPUTS.items():
        if unet.get(name) is not None and name not in own_inputs:
            return f"its UNet takes {what} ({name})"
    n, given = latent_channels, unet["in_channels"]
    if given != n:
        kinds = {
            2 * n + 1: "an inpainting model: latents, a mask and the masked picture",
            2 * n: "a model that edits pictures (InstructPix2Pix): latents and the picture",
            n + 1: "a model that draws by depth (depth2img): latents and a depth map",
            n + 3: "an upscaler: latents and the small picture",
        }
        what = kinds.get(given, "what belongs to another model or another VAE")
        return f"its UNet takes {given} channels and the VAE gives {n}; this is {what}"
    if unet["out_channels"] != n:
        return f"its UNet gives {unet['out_channels']} channels and the VAE takes {n}; it predicts more than the noise"
    widths = unet["cross_attention_dim"]
    if any(width != text_width for width in (widths if isinstance(widths, (list, tuple)) else [widths])):
        return f"its UNet takes prompts of width {widths}, the text encoder gives {text_width}"
    return None


def variants(folder: Path, parts: tuple[str, ...]) -> dict[str, set[str | None]]:
    """Find the variants of each part's weights in a model's folder, e.g. "fp16"; None stands for the plain files.

    Parts without weights are left out.
    """
    found = {}
    for part in parts:
        matches = [m for p in (folder / part).glob("*") if (m := WEIGHTS.fullmatch(p.name))]
        if matches:
            found[part] = {m["before"] or m["after"] for m in matches}
    return found


def variant_hint(folder: Path, parts: tuple[str, ...], asked: str | None) -> str | None:
    """Say how to ask for weights that a folder holds, if it holds those of some part in other variants only.

    Args:
        folder: the model's folder.
        parts: the names of the parts that are needed.
        asked: the variant that was asked for; None is none.

    Returns:
        A clause for an error message, or None if every part has weights of the variant.
    """
    lacking = {part: names for part, names in variants(folder, parts).items() if asked not in names}
    if not lacking:
        return None
    common = set.intersection(*lacking.values())
    if asked is None and (names := sorted(name for name in common if name)):
        return f"its weights are there as {', '.join(names)} only; add --variant={names[0]}"
    if None in common:
        return f"{', '.join(lacking)} has no weights of --variant={asked}, but plain ones; drop the flag"
    return f"{', '.join(lacking)} has weights of other variants only; give --variant or complete the folder"
