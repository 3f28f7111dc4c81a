"""Ways to compute the Cayley transforms of many small blocks, measured on the sets of blocks that real models have.

On a GPU, torch computes batches of small inverses in loops of cuSOLVER or MAGMA. The alternatives here are elimination
in vector operations over the batch, products alone (Newton and Schulz), and inverses by halves. For a block R, with
S = (R - Rᵀ) / 2, the transform is Q = 2 (I + S)⁻¹ - I.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from boft.batch_last import invert
from boft.super_blocks import all_super_blocks
from finetuning.studies.gpu_check.check import Check
from finetuning.studies.gpu_check.clock import milliseconds
from finetuning.studies.gpu_check.shapes import Shape
from finetuning.studies.throughput.timing import interleaved_times

SPREADS = (0.05, 0.5)  # standard deviations of R: as after training, and far beyond
LARGEST_FOR_ELIMINATION = 32  # block size
SMALLEST_HALF = 16  # block size up to which elimination is used instead of halves
ITERATIONS = 6  # of Newton and Schulz: enough for R of standard deviation 0.5
Blocks = list[tuple[int, int, int]]  # (m, number of blocks of a factor, b)


def block_sets(shape: Shape) -> dict[str, Blocks]:
    """The blocks of a model's adapters for each choice of block size, with all blocks of one size counted together."""
    with torch.device("meta"):
        model = shape.build()
    widths = [int(cast(nn.Linear, model.get_submodule(name)).in_features) for name in shape.target_names(model)]
    sets: dict[str, Blocks] = {f"b=8 m={m}": [(m, sum(widths) // 8, 8)] for m in (1, 2, 4)}
    counts = Counter(width // 8 for width in widths)
    return sets | {"8 blocks": [(1, 8 * count, b) for b, count in sorted(counts.items())]}


def measure(check: Check, blocks: Blocks, rounds: int) -> dict[str, dict[str, Any]]:
    """Time each way on a whole set of blocks, forward, and compare its Q with float64.

    The adapter's own solver is timed as well, forward and backward, with the composition of the factors.

    Returns:
        {way: {"ms": median, "error_at_…": largest error of Q}}, or {"error": …} for a way that failed.
    """
    sets = {s: [draw(check.device, s, m * count, b, 0) for m, count, b in blocks] for s in SPREADS}
    largest = max(b for _, _, b in blocks)
    rows: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        if largest > LIMITS.get(name, largest):
            continue
        try:
            rows[name] = {f"error_at_{s}": max(error(way, R) for R in sets[s]) for s in SPREADS}
            run = {name: partial(time_way, check.device, way, sets[SPREADS[0]])}
            rows[name]["ms"] = statistics.median(interleaved_times(run, rounds)[name])
        except Exception as fault:
            rows[name] = {"error": f"{type(fault).__name__}: {str(fault)[:300]}"}
            check.release()
    parameters = [
        draw(check.device, SPREADS[0], m * count, b, 0).view(m, count, b, b).requires_grad_() for m, count, b in blocks
    ]

    def solve() -> None:
        solved = [all_super_blocks([R])[0] for R in parameters]
        torch.autograd.grad(solved, parameters, [torch.ones_like(part) for part in solved])

    own = {"own": lambda: milliseconds(check.device, solve)}
    rows["as it is, composed, forward and backward"] = {"ms": statistics.median(interleaved_times(own, rounds)["own"])}
    return rows


def time_way(device: torch.device, way: Callable[[Tensor], Tensor], blocks: Sequence[Tensor]) -> float:
    """Milliseconds that a way takes for all blocks, each of them (n, b, b)."""
    return milliseconds(device, lambda: [way(R) for R in blocks])


def draw(device: torch.device, std: float, count: int, b: int, seed: int) -> Tensor:
    """Random blocks R (count, b, b) of this standard deviation."""
    generator = torch.Generator(device).manual_seed(seed)
    return std * torch.randn(count, b, b, generator=generator, device=device)


def error(way: Callable[[Tensor], Tensor], R: Tensor) -> float:
    """The largest difference between a way's Q and the one in float64, over the first 64 blocks of R (n, b, b)."""
    few = R[:64].contiguous()
    S = (few - few.mT).double() / 2
    I = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return float((way(few).double() - torch.linalg.solve(I + S, I - S)).abs().max())


# Ways from R (n, b, b) to Q (n, b, b)


def by_inverse(R: Tensor) -> Tensor:
    """By torch's batched inverse."""
    return from_inverse(torch.linalg.inv_ex(shifted(R)).inverse)


def by_solve(R: Tensor) -> Tensor:
    """By torch's batched solver, Q = (I + S)⁻¹ (I - S)."""
    A = shifted(R)
    return torch.linalg.solve_ex(A, A.mT).result  # (I + S)ᵀ = I - S


def by_elimination_batch_last(R: Tensor) -> Tensor:
    """By the elimination that the adapter uses on a CPU, with the batch in the last axis."""
    A = shifted(R.permute(1, 2, 0).contiguous(), rows=0)
    return from_inverse(invert(A[None])[0].permute(2, 0, 1).contiguous())


def by_elimination(R: Tensor) -> Tensor:
    """By Gauss-Jordan elimination without pivots, which a matrix whose symmetric part is I does not need."""
    return from_inverse(eliminate(shifted(R)))


def by_products(R: Tensor) -> Tensor:
    """By Newton's iteration X ← X (2 I - A X).

    It begins at a multiple of Aᵀ from which it always converges: AᵀA has eigenvalues 1 + σ², and half the squared
    Frobenius norm of a skew matrix is at least the largest σ².
    """
    A = shifted(R)
    most = (A.square().sum((-2, -1), keepdim=True) - A.shape[-1]) / 2  # the largest σ² is no larger
    X = A.mT * (2 / (2 + most))
    for _ in range(ITERATIONS):
        X = torch.baddbmm(X, X, A @ X, beta=2, alpha=-1)
    return from_inverse(X)


def by_halves(R: Tensor) -> Tensor:
    """By products from the inverses of a quarter and of its Schur complement, down to sizes for elimination."""
    return from_inverse(halve(shifted(R)))


def halve(A: Tensor) -> Tensor:
    """The inverses of A (n, b, b), by halves."""
    if A.shape[-1] <= SMALLEST_HALF:
        return eliminate(A.clone())
    h = A.shape[-1] // 2
    P, U, V, Z = A[:, :h, :h], A[:, :h, h:], A[:, h:, :h], A[:, h:, h:]
    P = halve(P)
    VP, PU = V @ P, P @ U
    Z = halve(torch.baddbmm(Z, VP, U, alpha=-1))
    PUZ = PU @ Z
    upper = torch.cat([torch.baddbmm(P, PUZ, VP), -PUZ], dim=-1)
    return torch.cat([upper, torch.cat([-(Z @ VP), Z], dim=-1)], dim=-2)


def eliminate(A: Tensor) -> Tensor:
    """The inverses of A (n, b, b), written over A."""
    for k in range(A.shape[-1]):
        inverse = A[:, k, k].reciprocal()
        row = A[:, k] * inverse[:, None]
        row[:, k] = inverse
        column = A[:, :, k].clone()
        A[:, :, k] = 0
        A.addcmul_(column[:, :, None], row[:, None, :], value=-1)
        A[:, k] = row
    return A


def shifted(R: Tensor, rows: int = -2) -> Tensor:
    """I + S. The rows of each matrix are in the axis `rows`, and its columns in the next one."""
    axes = (rows, rows + 1)
    A = 0.5 * (R - R.transpose(*axes))
    A.diagonal(dim1=axes[0], dim2=axes[1]).add_(1)
    return A


def from_inverse(X: Tensor) -> Tensor:
    """Q = 2 X - I, where X = (I + S)⁻¹."""
    Q = 2 * X
    Q.diagonal(dim1=-2, dim2=-1).sub_(1)
    return Q


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.linalg.inv_ex": by_inverse,
    "torch.linalg.solve_ex": by_solve,
    "elimination, batch last": by_elimination_batch_last,
    "elimination, batch first": by_elimination,
    f"products alone, {ITERATIONS} iterations": by_products,
    "by halves": by_halves,
}
LIMITS = {"elimination, batch last": LARGEST_FOR_ELIMINATION, "elimination, batch first": LARGEST_FOR_ELIMINATION}
