"""The butterfly rotation as pure functions, from skew matrices to products with activations and weights.

BOFT (https://arxiv.org/abs/2311.06243) writes an orthogonal matrix over d features as a product of m sparse factors,

    B = B_{m-1} … B_1 B_0,        each factor made of D = d / b orthogonal blocks of b × b, r = b / 2.

Factor i mixes features at stride 2^i. With G = D / 2^i groups, a feature has the index

    f = ((g · 2 + h) · 2^i + q) · r + t,      g < G,  h < 2,  q < 2^i,  t < r,

and block k = g · 2^i + q of factor i holds it in row h · r + t. Products are on row vectors: x B applies B_{m-1}
first.

B is block-diagonal in contiguous super-blocks of K = b · 2^(m-1) features. So the factors are composed once a step
into (d / K, K, K), whatever the batch, and reach the activations as one grouped matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew(R: Tensor) -> Tensor:
    """Skew-symmetric part S = (R - Rᵀ) / 2 of the stored parameters, (..., b, b)."""
    return 0.5 * (R - R.mT)


# Cayley transform (OFT, https://arxiv.org/abs/2306.07280, Section 3.3).
def cayley(S: Tensor) -> Tensor:
    """Orthogonal matrices Q = (I - S)(I + S)⁻¹ of skew-symmetric S, (..., b, b). Never has the eigenvalue -1."""
    return _Cayley.apply(S)


class _Cayley(torch.autograd.Function):
    """Since Q = 2 (I + S)⁻¹ - I, one inverse gives Q, and Q alone gives the gradient: no second solve, nothing else
    saved. I + S is never singular, so that `inv_ex` needs no check, which would synchronize with the device."""

    @staticmethod
    def forward(ctx, S: Tensor) -> Tensor:
        I = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        Q = torch.linalg.inv_ex(I + S).inverse.mul_(2).sub_(I)
        ctx.save_for_backward(Q)
        return Q

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (Q,) = ctx.saved_tensors
        I = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        A = (Q + I).mT  # 2 (I + S)⁻ᵀ
        return -0.5 * (A @ grad @ A)


# One butterfly factor (BOFT, Equation 5), without a permutation matrix.
def apply_factor(x: Tensor, Q: Tensor, i: int) -> Tensor:
    """x B_i for one factor: the definition, literally. Slow; what the composed form is tested against.

    Args:
        x: Rows to rotate, (..., d).
        Q: Orthogonal blocks of factor i, (D, b, b).
        i: Index of the factor; it mixes features at stride 2^i.

    Returns:
        (..., d)
    """
    D, b, _ = Q.shape
    if i == 0:
        return torch.einsum("...kc,kce->...ke", x.unflatten(-1, (D, b)), Q).flatten(-2)
    s, r = 2**i, b // 2
    x = x.unflatten(-1, (D // s, 2, s, r)).transpose(-3, -2)  # ... (g h q t) -> ... g q h t
    x = torch.einsum("...kc,kce->...ke", x.reshape(*x.shape[:-4], D, b), Q)
    return x.unflatten(-2, (D // s, s)).unflatten(-1, (2, r)).transpose(-3, -2).flatten(-4)


# The product of the factors (BOFT, Equation 4).
def compose(Q: Tensor) -> Tensor:
    """Composes the factors into the super-blocks of B.

    The product of the first i factors is block-diagonal in blocks of k = b · 2^(i-1). Factor i joins two neighbours,
    upper and lower half h', and reads only r of their rows at a time, so that the last factor costs 2 d K r flops
    and the others together less than that: linear in the size of the result.

    Args:
        Q: Orthogonal blocks of all factors, (m, D, b, b). Blocks of several layers may stand side by side along D.

    Returns:
        Super-blocks, (D / 2^(m-1), K, K), K = b · 2^(m-1).
    """
    m, D, b, _ = Q.shape
    C = Q[0]  # (D, b, b)
    for i in range(1, m):
        s, r, k = 2**i, b // 2, C.shape[-1]
        left = Q[i].view(D // s, s, b, 2, r).permute(0, 3, 1, 2, 4)  # g q (h t) h' t' -> g h' q (h t) t'
        right = C.view(D // s, 2, s, r, k)  # g h' q t' c
        C = (left @ right).view(D // s, 2, s, 2, r, k)  # g h' q h t c
        C = C.permute(0, 3, 2, 4, 1, 5).reshape(D // s, 2 * k, 2 * k)  # -> g (h q t) (h' c)
    return C


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x B for rows x (..., d) and super-blocks (n, K, K)."""
    n, K, _ = blocks.shape
    z = x.reshape(-1, n, K).transpose(0, 1) @ blocks  # (n, T, K)
    return z.transpose(0, 1).reshape(x.shape)


def rotate_weight(W: Tensor, blocks: Tensor) -> Tensor:
    """W Bᵀ for a weight (o, d) and super-blocks (n, K, K): the filters rotated, as in the effective weight."""
    return apply_blocks(W, blocks.mT)


def dense(blocks: Tensor) -> Tensor:
    """The super-blocks (n, K, K) as one matrix B, (d, d)."""
    return torch.block_diag(*blocks)
