"""Many small matrices at once on a CPU: laid side by side in the last axis, (..., b, b, G).

Batched products and inverses of small matrices spend their time on calling BLAS and LAPACK for each one. With the
batch in the last axis, every step of an algorithm is one vector operation over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# A transposition is a product with the identity, exactly: torch transposes on one thread and a few floats at a time,
# a BLAS on all, and it rearranges what it multiplies anyhow. (What is not finite spreads within its super-block, which
# it would not leave finite either.)


def to_batch_last(X: Tensor, P: int = 1) -> Tensor:
    """(G · P, b, b) -> (P, b, b, G)."""
    b = X.shape[-1]
    identity, k = _identity(X, P, b)
    columns = X.reshape(-1, P * b * b // k, k).permute(1, 2, 0)  # (P b b / k, k, G)
    return torch.bmm(identity.expand(len(columns), k, k), columns).view(P, b, b, -1)


def from_batch_last(X: Tensor, out: Tensor) -> Tensor:
    """(P, b, b, G) -> (G · P, b, b), which it returns."""
    P, b, _, G = X.shape
    identity, k = _identity(X, P, b)
    rows = torch.bmm(X.view(-1, k, G).transpose(1, 2), identity.expand(P * b * b // k, k, k))  # (P b b / k, G, k)
    if out.is_contiguous():
        out.view(G, -1, k).copy_(rows.transpose(0, 1))
    else:
        out.copy_(rows.transpose(0, 1).reshape(out.shape))
    return out


def _identity(X: Tensor, P: int, b: int) -> tuple[Tensor, int]:
    """An identity matrix whose size divides P b b, that of a cache line if that is possible, and its size."""
    k = math.gcd(P * b * b, 16)
    k = k if k >= 8 else b
    return torch.eye(k, dtype=X.dtype), k


def accumulate(out: Tensor, terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Writes the sum of the elementwise products of all pairs."""
    for number, (left, right) in enumerate(terms):
        if number == 0:
            torch.mul(left, right, out=out)
        else:
            out.addcmul_(left, right)
    return out


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B."""
    terms = ((A[..., :, j, None, :], B[..., None, j, :, :]) for j in range(A.shape[-2]))
    return accumulate(torch.empty_like(B), terms)


def invert(A: Tensor) -> Tensor:
    """Inverse of matrices whose symmetric part is the identity, or a multiple of it or more, in their place, by
    Gauss-Jordan elimination.

    The symmetric part of a Schur complement is at least that of the matrix: no pivots need to be looked for.
    """
    pivots, rows, columns = diagonal(A).unbind(-1), A.unbind(-3), A.unbind(-2)  # views: A changes under them
    for k, (pivot, row, column) in enumerate(zip(pivots, rows, columns)):
        inverse = pivot.reciprocal()
        new_row = row * inverse[..., None, :]
        new_row[..., k, :] = inverse
        old_column = column.clone()
        column.zero_()
        A.addcmul_(old_column[..., :, None, :], new_row[..., None, :, :], value=-1)
        row.copy_(new_row)
    return A


def diagonal(A: Tensor) -> Tensor:
    """A view of the diagonals, (..., G, b)."""
    return A.diagonal(dim1=-3, dim2=-2)
