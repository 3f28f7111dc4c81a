"""The Cayley transform: orthogonal matrices from stored parameters.

    Q = (I - S)(I + S)⁻¹ = 2 (I + S)⁻¹ - I,        S = (R - Rᵀ) / 2

One inverse gives Q, and Q alone gives the gradient: with X = (I + S)⁻¹ = (Q + I) / 2, that of S is -2 Xᵀ dQ Xᵀ, and
that of R its skew-symmetric part. No second solve, and nothing else is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boft.batch_last import from_batch_last, invert, to_batch_last
from boft.tracing import is_on_host, is_traced

LARGEST_FOR_LAPACK = 64  # on several threads, batches of larger matrices can keep LAPACK busy for minutes
LARGEST_FOR_ELIMINATION = 24  # by vector operations, on a CPU; larger matrices are inverted by halves
SMALLEST_BATCH = 192  # fewer matrices are less work for LAPACK
NEWTON_ABOVE = 2.0  # entries of S from which an inverse that was found without pivots needs a Newton step


def skew(R: Tensor) -> Tensor:
    """Skew-symmetric part S = (R - Rᵀ) / 2 of the stored parameters, (..., b, b)."""
    return 0.5 * (R - R.mT)


def cayley(S: Tensor) -> Tensor:
    """Orthogonal matrices Q = (I - S)(I + S)⁻¹ of skew-symmetric S, (..., b, b). Never has the eigenvalue -1."""
    return factors(S)[0]  # S is its own skew part


# BOFT, Section 3, with S = -Q of the paper.
def factors(*parameters: Tensor) -> tuple[Tensor, ...]:
    """cayley(skew(R)) of each of the stored parameters R, (..., D, b, b), which may differ in D; differentiable, in
    few passes over memory."""
    if is_traced(*parameters):
        return tuple(_factor_plainly(R) for R in parameters)
    return _Factors.apply(*parameters)


def _factor_plainly(R: Tensor) -> Tensor:
    """The same for one R in plain differentiable operations."""
    I = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return 2 * torch.linalg.inv_ex(I + skew(R)).inverse - I


class _Factors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        A = _differences(parameters)  # R - Rᵀ = 2 S
        A.diagonal(dim1=-2, dim2=-1).add_(2)
        Q = _inverse(A).mul_(4)
        Q.diagonal(dim1=-2, dim2=-1).sub_(1)
        ctx.sizes = [R.shape[-3] for R in parameters]
        ctx.save_for_backward(Q)
        return Q.split(ctx.sizes, dim=-3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):
        (Q,) = ctx.saved_tensors
        parts = Q.split(ctx.sizes, dim=-3)
        return tuple(None if grad is None else _gradient(part, grad) for part, grad in zip(parts, grads))


def _differences(parameters: Sequence[Tensor]) -> Tensor:
    """R - Rᵀ of all parameters, side by side."""
    if len(parameters) == 1:
        return parameters[0] - parameters[0].mT
    first, sizes = parameters[0], [R.shape[-3] for R in parameters]
    result = first.new_empty(*first.shape[:-3], sum(sizes), *first.shape[-2:])
    for R, part in zip(parameters, result.split(sizes, dim=-3)):
        torch.sub(R, R.mT, out=part)
    return result


def _gradient(Q: Tensor, grad: Tensor) -> Tensor:
    """Gradient of R, in row-major order."""
    X = 0.5 * Q
    X.diagonal(dim1=-2, dim2=-1).add_(0.5)  # (I + S)⁻¹
    X = X.mT
    product = X @ grad @ X  # that of S, times -1/2
    return torch.sub(product.mT, product, out=torch.empty_like(product))


def _inverse(A: Tensor) -> Tensor:
    """Inverse of A = 2 (I + S), S skew-symmetric, (..., b, b).

    A is never singular, so that `inv_ex` needs no check, which would synchronize with a GPU.
    """
    b, n = A.shape[-1], A.shape[:-2].numel()
    if not is_on_host(A):
        return torch.linalg.inv_ex(A).inverse
    return _invert_by_halves(A.reshape(n, b, b), polish=bool(A.max() > 2 * NEWTON_ABOVE)).view(A.shape)


def _invert_by_halves(A: Tensor, polish: bool) -> Tensor:
    """Inverse of (n, b, b), in its place, from that of the upper left quarter P and of its Schur complement Z, in
    grouped products.

    The symmetric part of A is a multiple of the identity, and that of its Schur complements at least that: no pivots
    need to be looked for. Large entries cost precision all the same, which a Newton step gives back.
    """
    n, b, _ = A.shape
    if n < SMALLEST_BATCH and b <= LARGEST_FOR_LAPACK:
        return A.copy_(torch.linalg.inv_ex(A).inverse)
    before = A.clone() if polish else None
    if b <= LARGEST_FOR_ELIMINATION:
        from_batch_last(invert(to_batch_last(A)), out=A)
    else:
        h = b // 2
        P, U, V, Z = A[:, :h, :h], A[:, :h, h:], A[:, h:, :h], A[:, h:, h:]
        _invert_by_halves(P, polish)
        VP, PU = torch.bmm(V, P), torch.bmm(P, U)
        Z.sub_(torch.bmm(VP, U))
        _invert_by_halves(Z, polish)
        PUZ = torch.bmm(PU, Z)
        torch.neg(PUZ, out=U)
        torch.neg(torch.bmm(Z, VP), out=V)
        P.add_(torch.bmm(PUZ, VP))
    return A.copy_(torch.baddbmm(A, A, before @ A, beta=2, alpha=-1)) if polish else A  # A (2 I - before A)
