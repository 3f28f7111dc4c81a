"""From stored parameters to super-blocks, (m, D, b, b) -> (D / P, K, K) with P = 2^(m-1) and K = b P, fast.

It is compose(factors(R)). On a GPU that is what runs, for all layers together: a few batched kernels. On a CPU, small
blocks are laid side by side in the last axis instead (`boft.batch_last`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boft.batch_last import accumulate, diagonal, from_batch_last, invert, product, to_batch_last
from boft.cayley import NEWTON_ABOVE, factors
from boft.rotation import compose
from boft.tracing import is_on_host, is_traced

LARGEST_BLOCK = 12  # larger ones are work enough for a BLAS call each
SMALLEST_BATCH = 128  # fewer groups are less work than calling an operation for each step
LARGEST_TOGETHER = 64  # larger blocks are work enough for operations of each layer's own, which saves copies
CHUNK_BYTES = 1 << 23  # of one copy of R, which goes through all steps while it is in the caches


def super_blocks(R: Tensor) -> Tensor:
    """The super-blocks of B, differentiable.

    Args:
        R: Stored parameters, (m, D, b, b), float32 or float64.

    Returns:
        (D / P, K, K), K = b · P. Orthogonal.
    """
    return all_super_blocks([R])[0]


def all_super_blocks(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`super_blocks` of several layers, which may differ in D, in a few operations for all of them."""
    m, _, b, _ = parameters[0].shape
    D = [R.shape[1] for R in parameters]
    on_cpu = is_on_host(parameters[0]) and not is_traced(*parameters)
    is_small = b <= LARGEST_BLOCK and sum(D) >> (m - 1) >= SMALLEST_BATCH
    if on_cpu and m == 1 and b > LARGEST_TOGETHER:
        return factors(*(R.view(R.shape[1:]) for R in parameters))
    R = torch.cat(tuple(parameters), dim=1)
    blocks = _BatchLast.apply(R) if on_cpu and is_small else compose(factors(R)[0])
    return blocks.split([size >> (m - 1) for size in D])


class _BatchLast(torch.autograd.Function):
    """Factors are (m, P, b, b, G) inside, with G = D / P: block k = g · P + p is [:, p, :, :, g]."""

    @staticmethod
    def forward(ctx, R: Tensor) -> Tensor:
        m, D, b, _ = R.shape
        P = 1 << (m - 1)
        blocks = R.new_empty(D // P, b * P, b * P)
        ctx.chunk = max(128, CHUNK_BYTES // (m * P * b * b * R.element_size()))
        saved = []
        for part, out in zip(R.split(ctx.chunk * P, dim=1), blocks.split(ctx.chunk)):
            Q = _cayley(torch.stack([to_batch_last(factor, P) for factor in part]))
            products = [Q[0]]
            for i in range(1, m):
                products.append(_join(products[-1], Q[i], i))
            from_batch_last(products[-1], out)
            saved += [Q, *products[1:-1]]
        ctx.save_for_backward(*saved)
        return blocks

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        saved = iter(ctx.saved_tensors)
        m, P, b, _, _ = ctx.saved_tensors[0].shape
        dR = grad.new_empty(m, len(grad) * P, b, b)
        for dblocks, out in zip(grad.contiguous().split(ctx.chunk), dR.split(ctx.chunk * P, dim=1)):
            Q = next(saved)
            products = [Q[0], *(next(saved) for _ in range(m - 2))]
            dC, dQ = to_batch_last(dblocks, 1), torch.empty_like(Q)
            for i in range(m - 1, 0, -1):
                dC = _join_backward(products[i - 1], Q[i], i, dC, dQ[i])
            dQ[0] = dC
            for factor, target in zip(_cayley_backward(Q, dQ), out):
                from_batch_last(factor, target)
        return dR


def _cayley(R: Tensor) -> Tensor:
    """Q = 2 (I + S)⁻¹ - I of S = (R - Rᵀ) / 2, (..., b, b, G)."""
    A = R - R.transpose(-3, -2)
    is_large = A.max() > 2 * NEWTON_ABOVE
    diagonal(A).fill_(2)
    X = invert(A.clone() if is_large else A)  # half the inverse of I + S
    if is_large:
        X = 2 * X - product(X, product(A, X))
    X.mul_(4)
    diagonal(X).sub_(1)
    return X


def _cayley_backward(Q: Tensor, dQ: Tensor) -> Tensor:
    """Gradient of R, see `boft.cayley`."""
    X = 0.5 * Q
    diagonal(X).add_(0.5)  # (I + S)⁻¹
    X = X.transpose(-3, -2)
    halved = product(product(X, dQ), X)  # gradient of S, times -1/2
    return halved.transpose(-3, -2) - halved


# One step of the composition (see `rotation.compose`): factor i joins two neighbouring blocks h' of the product C of
# the factors before it. Axes are named u q h t h' t' c G, block g · P + p of the factor with p = u · 2^i + q.


def _views(C: Tensor, Q: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """C as (u, h', q, t', c, G) and factor i as (u, q, h, t, h', t', G)."""
    (P, b, _, G), s = Q.shape, 1 << i
    r = b // 2
    return C.view(P // s, 2, s, r, -1, G), Q.view(P // s, s, 2, r, 2, r, G)


def _join(C: Tensor, Q: Tensor, i: int) -> Tensor:
    """B_i C for C (2 u, k, k, G) and factor i (P, b, b, G): (u, 2 k, 2 k, G), the sum over t'."""
    C, Q = _views(C, Q, i)
    u, s, _, r, _, _, G = Q.shape
    k = C.shape[-2]
    out = C.new_empty(u, 2, s, r, 2, k, G)  # u h q t h' c G
    terms = (
        (Q[..., t, :].transpose(1, 2)[..., None, :], C[:, :, :, t].transpose(1, 2)[:, None, :, None]) for t in range(r)
    )
    return accumulate(out, terms).view(u, 2 * k, 2 * k, G)


def _join_backward(C: Tensor, Q: Tensor, i: int, grad: Tensor, dQ: Tensor) -> Tensor:
    """Gradient of C; that of the factor, (P, b, b, G), is written to dQ. grad: (u, 2 k, 2 k, G)."""
    shape = C.shape
    _, dQ = _views(C, dQ, i)
    C, Q = _views(C, Q, i)
    u, s, _, r, _, _, G = Q.shape
    k = C.shape[-2]
    grad = grad.view(u, 2, s, r, 2, k, G)  # u h q t h' c G
    terms = (
        (grad[..., c, :].transpose(1, 2)[..., None, :], C[..., c, :].transpose(1, 2)[:, :, None, None])
        for c in range(k)
    )
    accumulate(dQ, terms)
    terms = (
        (Q[:, :, h, t].transpose(1, 2)[..., None, :], grad[:, h, :, t].transpose(1, 2)[:, :, :, None])
        for h in (0, 1)
        for t in range(r)
    )
    return accumulate(torch.empty_like(C), terms).view(shape)
