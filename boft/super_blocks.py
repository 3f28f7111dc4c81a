"""From stored parameters to super-blocks, (m, D, b, b) -> (D / P, K, K) with P = 2^(m-1) and K = b P, fast.

`super_blocks` is compose(factors(R)). On a GPU that is what runs: a few batched kernels. On a CPU, batched
products and inverses of such small matrices spend their time on calling BLAS and LAPACK for each one. There, the
matrices of a batch are laid side by side in the last axis instead, and every step of an algorithm is one vector
operation over all of them; a chunk of the batch goes through all steps while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from boft.rotation import NEWTON_ABOVE, compose, factors

LARGEST_BLOCK = 12  # larger ones are work enough for a BLAS call each
SMALLEST_BATCH = 64  # fewer groups are less work than calling an operation for each step
CHUNK_BYTES = 1 << 22  # of one copy of R: what fits the cores' caches


def super_blocks(R: Tensor) -> Tensor:
    """The super-blocks of B, differentiable.

    Args:
        R: Stored parameters, (m, D, b, b), float32 or float64. Blocks of several layers may stand side by side along
            D, each a multiple of P = 2^(m-1).

    Returns:
        (D / P, K, K), K = b · P. Orthogonal.
    """
    m, D, b, _ = R.shape
    is_small = b <= LARGEST_BLOCK and D >> (m - 1) >= SMALLEST_BATCH
    if R.device.type == "cpu" and is_small and not torch.compiler.is_compiling():
        return _BatchLast.apply(R)
    return compose(factors(R))


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
            Q = _cayley(torch.stack([_to_batch_last(factor, P) for factor in part]))
            products = [Q[0]]
            for i in range(1, m):
                products.append(_join(products[-1], Q[i], i))
            _from_batch_last(products[-1], out)
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
            dC, dQ = _to_batch_last(dblocks, 1), torch.empty_like(Q)
            for i in range(m - 1, 0, -1):
                dC = _join_backward(products[i - 1], Q[i], i, dC, dQ[i])
            dQ[0] = dC
            for factor, target in zip(_cayley_backward(Q, dQ), out):
                _from_batch_last(factor, target)
        return dR


def _to_batch_last(X: Tensor, P: int) -> Tensor:
    """(G · P, b, b) -> (P, b, b, G). Two-dimensional, because torch has a fast kernel for that."""
    b = X.shape[-1]
    return X.reshape(-1, P * b * b).t().contiguous().view(P, b, b, -1)


def _from_batch_last(X: Tensor, out: Tensor) -> None:
    """(P, b, b, G) -> (G · P, b, b)."""
    G = X.shape[-1]
    out.view(G, -1).copy_(X.view(-1, G).t())


def _accumulate(out: Tensor, terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Writes the sum of the elementwise products of all pairs."""
    for number, (left, right) in enumerate(terms):
        if number == 0:
            torch.mul(left, right, out=out)
        else:
            out.addcmul_(left, right)
    return out


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A B of matrices (..., b, b, G)."""
    terms = ((A[..., :, j, None, :], B[..., None, j, :, :]) for j in range(A.shape[-2]))
    return _accumulate(torch.empty_like(B), terms)


def _inverse(A: Tensor) -> Tensor:
    """Inverse of A = I + S, (..., b, b, G), in its place, by Gauss-Jordan elimination.

    The symmetric part of A is I, and that of its Schur complements at least I: no pivots need to be looked for.
    """
    for k in range(A.shape[-2]):
        pivot = A[..., k, k, :].reciprocal()
        row = A[..., k, :, :] * pivot[..., None, :]
        row[..., k, :] = pivot
        column = A[..., :, k, :].clone()
        A[..., :, k, :] = 0
        A.addcmul_(column[..., :, None, :], row[..., None, :, :], value=-1)
        A[..., k, :, :] = row
    return A


def _cayley(R: Tensor) -> Tensor:
    """Q = 2 (I + S)⁻¹ - I of S = (R - Rᵀ) / 2, (..., b, b, G)."""
    A = (R - R.transpose(-3, -2)).mul_(0.5)
    is_large = A.max() > NEWTON_ABOVE  # of S: it is skew-symmetric
    _diagonal(A).fill_(1)
    X = _inverse(A.clone() if is_large else A)
    if is_large:
        X = 2 * X - _product(X, _product(A, X))
    X.mul_(2)
    _diagonal(X).sub_(1)
    return X


def _cayley_backward(Q: Tensor, dQ: Tensor) -> Tensor:
    """dS = -½ Aᵀ dQ Aᵀ with A = Q + I, since Q = 2 (I + S)⁻¹ - I; dR = (dS - dSᵀ) / 2."""
    A = Q.clone()
    _diagonal(A).add_(1)
    A = A.transpose(-3, -2)
    dS = _product(_product(A, dQ), A)
    return (dS.transpose(-3, -2) - dS).mul_(0.25)


def _diagonal(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-3, dim2=-2)


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
    return _accumulate(out, terms).view(u, 2 * k, 2 * k, G)


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
    _accumulate(dQ, terms)
    terms = (
        (Q[:, :, h, t].transpose(1, 2)[..., None, :], grad[:, h, :, t].transpose(1, 2)[:, :, :, None])
        for h in (0, 1)
        for t in range(r)
    )
    return _accumulate(torch.empty_like(C), terms).view(shape)
