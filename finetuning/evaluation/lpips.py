"""LPIPS (arXiv 1801.03924), version 0.1 on AlexNet: a perceptual distance of two pictures.

The weights are two local files that this project does not ship: torchvision's AlexNet (alexnet-owt-7be5be79.pth) and
the linear layers of the `lpips` package (lpips/weights/v0.1/alex.pth). AlexNet's five convolutions are written out
here, because the `lpips` package needs torchvision and downloads AlexNet's weights by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from finetuning.errors import InputError

WIDTHS = (64, 192, 384, 256, 256)
_FEATURES = (0, 3, 6, 8, 10)  # the convolutions' indices in torchvision's `features`
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST_SIDE = 64  # pixels; of smaller pictures, AlexNet's last layers have one pixel or none left


def unit(features: torch.Tensor) -> torch.Tensor:
    """Scales the vector of channels at each place to length 1. features: (B, C, H, W)."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def distance(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weighted squared differences of unit features, averaged over places and summed over layers (Equation 1).

    Args:
        a, b: features of B pictures each: a tensor (B, C_l, H_l, W_l) for each layer l.
        weights: a tensor (C_l,) for each layer.

    Returns:
        (B,); 0 for equal features.
    """
    layers = [
        torch.einsum("bchw,c->bhw", (unit(x) - unit(y)).square(), w).mean((1, 2))  # (B,)
        for x, y, w in zip(a, b, weights)
    ]
    return torch.stack(layers).sum(0)


class LPIPS(nn.Module):
    """Features of five layers of AlexNet for pictures (B, 3, H, W) in [-1, 1], and the distances between them."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        shapes = ((3, 11, 4, 2), (64, 5, 1, 2), (192, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, width, kernel, stride, padding)
            for width, (inputs, kernel, stride, padding) in zip(WIDTHS, shapes)
        )
        self.linear = nn.ParameterList(torch.zeros(width) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each of the five rectifiers returns, (B, C_l, H_l, W_l)."""
        x, found = (images - self.shift) / self.scale, []
        for i, convolution in enumerate(self.convolutions):
            if i in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(convolution(x))
            found.append(x)
        return found

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances of B pictures in `a` to those at the same index in `b`, (B,)."""
        return distance(self.features(a), self.features(b), tuple(self.linear))

    @torch.no_grad()
    def pairs(self, generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Mean distance of each generated picture to all real ones: (N, 3, H, W) and (M, 3, H, W) to (N,)."""
        of_real = self.features(real)
        rows = []
        for image in generated:  # one at a time: features of all pairs would fill the memory
            own = [f.expand(len(real), -1, -1, -1) for f in self.features(image[None])]
            rows.append(distance(own, of_real, tuple(self.linear)).mean())
        return torch.stack(rows).cpu()


def load_lpips(alexnet: str | None, linear: str | None, device: str | torch.device = "cpu") -> LPIPS:
    """Load LPIPS from two local files.

    Args:
        alexnet: torchvision's weights of AlexNet, as --lpips_alexnet gives them.
        linear: the linear layers of the lpips package, as --lpips_linear gives them.

    Raises:
        InputError: if a file is not given or not there, or holds the weights of another network.
    """
    if alexnet is None or linear is None:
        missing = " and ".join(f for f, v in (("--lpips_alexnet", alexnet), ("--lpips_linear", linear)) if v is None)
        raise InputError(
            f"--lpips: needs {missing}: local files with torchvision's AlexNet weights (alexnet-owt-7be5be79.pth from "
            "download.pytorch.org/models) and with the lpips package's v0.1 linear weights (alex.pth); give both or "
            "drop --lpips"
        )
    model, state = LPIPS(), {}
    layers, lines = _read(alexnet, "--lpips_alexnet"), _read(linear, "--lpips_linear")
    try:
        for i, place in enumerate(_FEATURES):
            for part in ("weight", "bias"):
                state[f"convolutions.{i}.{part}"] = layers[f"features.{place}.{part}"]
    except KeyError as error:
        raise InputError(
            f"--lpips_alexnet={alexnet}: has no {error}; give torchvision's alexnet-owt-7be5be79.pth"
        ) from None
    try:
        for i in range(len(WIDTHS)):
            state[f"linear.{i}"] = lines[f"lin{i}.model.1.weight"].flatten()
    except KeyError as error:
        raise InputError(f"--lpips_linear={linear}: has no {error}; give lpips' weights/v0.1/alex.pth") from None
    try:
        model.load_state_dict({**model.state_dict(), **state})
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"--lpips_alexnet={alexnet}, --lpips_linear={linear}: do not fit ({text})") from None
    return model.to(device).eval()


def _read(path: str, flag: str) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights; `flag` is named in errors."""
    if not Path(path).is_file():
        raise InputError(f"{flag}={path}: no such file; it must lie on this machine, nothing is downloaded")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise InputError(f"{flag}={path}: cannot be read as PyTorch weights ({text})") from None
