"""The slow reference: dense matrices in float64, with peft's permutations, and small models to adapt."""

import torch
from peft.tuners.boft.layer import BOFTLayer as PeftLayer
from torch import nn


def dense_rotation(R):
    """B (d, d) of the parameters R (m, D, b, b), as peft defines it: B_i = P_i blockdiag(Q_i) P_iᵀ."""
    m, D, b, _ = R.shape
    d = D * b
    S = (R - R.mT) / 2
    I = torch.eye(b, dtype=R.dtype)
    Q = torch.linalg.solve(I + S, I - S, left=False)
    B = torch.eye(d, dtype=R.dtype)
    for i in range(m):
        order = PeftLayer.block_butterfly_perm(None, d, D // 2**i, b // 2, m - 1)
        P = torch.eye(d, dtype=R.dtype)[order]
        B = P @ torch.block_diag(*Q[i]) @ P.T @ B
    return B


def dense_linear(x, R, s, W, bias):
    """s ∘ (W (x B)ᵀ)ᵀ + bias in dense matrices."""
    y = (x @ dense_rotation(R) @ W.T) * s.flatten()
    return y if bias is None else y + bias


def randomize(model, seed=0, std=0.3):
    """Gives every BOFT parameter of a model a random value, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".boft_R." in name or ".boft_s." in name:
                noise = std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise + (1 if ".boft_s." in name else 0))
    return model


class Net(nn.Module):
    """Two linear layers, one without bias, a convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 64, bias=False)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):  # (N, 32)
        hidden = self.second(self.first(x).relu())  # (N, 64)
        return self.classifier(self.conv(hidden.view(-1, 4, 4, 4)).mean((2, 3)))  # (N, 3)


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype).eval()
