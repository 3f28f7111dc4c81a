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

LARGEST_FOR_LAPACK = 64  # on several threads, batches of larger matrices can keep LAPACK busy for minutes
NEWTON_ABOVE = 2.0  # entries of S from which an inverse that was found without pivots needs a Newton step


def skew(R: Tensor) -> Tensor:
    """Skew-symmetric part S = (R - Rᵀ) / 2 of the stored parameters, (..., b, b)."""
    return 0.5 * (R - R.mT)


def cayley(S: Tensor) -> Tensor:
    """Orthogonal matrices Q = (I - S)(I + S)⁻¹ of skew-symmetric S, (..., b, b). Never has the eigenvalue -1."""
    return factors(S)  # S is its own skew part


# Cayley transform (BOFT, Section 3, with S = -Q of the paper).
def factors(R: Tensor) -> Tensor:
    """cayley(skew(R)) in few passes over memory: the blocks of the factors from the stored parameters, (..., b, b)."""
    return _Factors.apply(R)


class _Factors(torch.autograd.Function):
    """Since Q = 2 (I + S)⁻¹ - I, one inverse gives Q, and Q alone gives the gradient: no second solve, nothing else
    saved."""

    @staticmethod
    def forward(ctx, R: Tensor) -> Tensor:
        A = (R - R.mT).mul_(0.5)
        A.diagonal(dim1=-2, dim2=-1).add_(1)
        Q = _inverse(A).mul_(2)
        Q.diagonal(dim1=-2, dim2=-1).sub_(1)
        ctx.save_for_backward(Q)
        return Q

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        A = ctx.saved_tensors[0].clone()
        A.diagonal(dim1=-2, dim2=-1).add_(1)  # 2 (I + S)⁻¹
        dS = A.mT @ grad @ A.mT  # times -1/2
        return (dS.mT - dS).mul_(0.25)


def _inverse(A: Tensor) -> Tensor:
    """Inverse of A = I + S, S skew-symmetric, (..., b, b).

    A is never singular, so that `inv_ex` needs no check, which would synchronize with a GPU.
    """
    if A.device.type != "cpu" or A.shape[-1] <= LARGEST_FOR_LAPACK or torch.compiler.is_compiling():
        return torch.linalg.inv_ex(A).inverse
    return _inverse_by_halves(A.flatten(0, -3), polish=bool(A.max() > NEWTON_ABOVE)).view(A.shape)


def _inverse_by_halves(A: Tensor, polish: bool) -> Tensor:
    """Inverse of (n, b, b) from that of the upper left quarter P and of its Schur complement, in grouped products.

    The symmetric part of A is I, and that of its Schur complements at least I: no pivots need to be looked for. Large
    entries cost precision all the same, which a Newton step gives back.
    """
    b = A.shape[-1]
    if b <= LARGEST_FOR_LAPACK:
        return torch.linalg.inv_ex(A).inverse
    h = b // 2
    U, V, W = A[:, :h, h:], A[:, h:, :h], A[:, h:, h:]
    P = _inverse_by_halves(A[:, :h, :h], polish)
    VP = V @ P
    Z = _inverse_by_halves(torch.baddbmm(W, VP, U, alpha=-1), polish)
    PUZ = P @ U @ Z
    X = torch.empty_like(A)
    X[:, :h, :h], X[:, :h, h:], X[:, h:, :h], X[:, h:, h:] = torch.baddbmm(P, PUZ, VP), -PUZ, -(Z @ VP), Z
    return torch.baddbmm(X, X, A @ X, beta=2, alpha=-1) if polish else X  # X (2 I - A X)


# One block butterfly component (BOFT, Section 4), without a permutation matrix.
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


# R(m, b), the product of the components (BOFT, Section 4).
def compose(Q: Tensor) -> Tensor:
    """Composes the factors into the super-blocks of B.

    The product of the first i factors is block-diagonal in blocks of k = b · 2^(i-1), and factor i joins two
    neighbours of them. So the work doubles from factor to factor, is linear in the size of the result, and is the
    same for any batch.

    Args:
        Q: Orthogonal blocks of all factors, (m, D, b, b). Blocks of several layers may stand side by side along D.

    Returns:
        Super-blocks, (D / 2^(m-1), K, K), K = b · 2^(m-1).
    """
    C = Q[0]  # (D, b, b)
    for i, factor in enumerate(Q[1:], start=1):
        C = _Join.apply(C, factor, i)
    return C


class _Join(torch.autograd.Function):
    """One step of the composition: C (2 G, k, k) and factor i (D, b, b) to B_i C, (G, 2 k, 2 k), G = D / 2^i.

    Block (g, q) of the factor reads r rows (q, t') of each of the two blocks h' of its group, and writes rows
    (h, q, t) of the joined block, in the columns of h'. What autograd would do with the same operations takes longer.
    """

    @staticmethod
    def forward(ctx, C: Tensor, Q: Tensor, i: int) -> Tensor:
        ctx.save_for_backward(C, Q)
        ctx.i = i
        (D, b, _), s, k = Q.shape, 2**i, C.shape[-1]
        r = b // 2
        joined = C.new_empty(D // s, 2, s, r, 2, k)  # g h q t h' c
        for half in (0, 1):
            rows = C.view(D // s, 2, k, k)[:, half].reshape(D, r, k)  # (g q) t' c
            product = Q[:, :, half * r : (half + 1) * r] @ rows  # (g q) (h t) c
            joined[:, :, :, :, half] = product.view(D // s, s, 2, r, k).transpose(1, 2)
        return joined.view(D // s, 2 * k, 2 * k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        C, Q = ctx.saved_tensors
        (D, b, _), s, k = Q.shape, 2**ctx.i, C.shape[-1]
        r = b // 2
        grad = grad.reshape(D // s, 2, s, r, 2 * k).transpose(1, 2).reshape(D, b, 2 * k)  # (g q) (h t) (h' c)
        dC, dQ = torch.empty_like(C).view(D // s, 2, s, r, k), torch.empty_like(Q)
        for half in (0, 1):
            rows = C.view(D // s, 2, k, k)[:, half].reshape(D, r, k)  # (g q) t' c
            columns = grad[:, :, half * k : (half + 1) * k]  # (g q) (h t) c
            dQ[:, :, half * r : (half + 1) * r] = columns @ rows.mT
            dC[:, half] = (Q[:, :, half * r : (half + 1) * r].mT @ columns).view(D // s, s, r, k)
        return dC.view(C.shape), dQ, None


# Products take x or W as they are and multiply in the dtype of the blocks, see `dtype_of_products`.


def dtype_of_products(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype blocks should multiply tensors of a dtype: batches of small half precision matrices are slower
    than those of float32 on a CPU, by more than the casts cost."""
    return torch.float32 if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x B for rows x (..., d) and super-blocks (n, K, K), in the dtype of x."""
    n, K, _ = blocks.shape
    z = torch.bmm(x.reshape(-1, n, K).transpose(0, 1).to(blocks.dtype), blocks)  # (n, T, K)
    return z.transpose(0, 1).to(x.dtype, memory_format=torch.contiguous_format).reshape(x.shape)


def rotate_weight(W: Tensor, blocks: Tensor) -> Tensor:
    """W Bᵀ for a weight (o, d) and super-blocks (n, K, K): the filters rotated, as in the effective weight."""
    return apply_blocks(W, blocks.mT)


def rotate_weight_transposed(W: Tensor, blocks: Tensor, s: Tensor | None = None) -> Tensor:
    """(diag(s) W Bᵀ)ᵀ, (d, o) in memory, which costs less by the copy that puts rows together. Not differentiable."""
    n, K, _ = blocks.shape
    product = torch.bmm(blocks, W.reshape(-1, n, K).permute(1, 2, 0).to(blocks.dtype)).view(-1, len(W))
    return (product if s is None else product.mul_(s)).to(W.dtype)


def outer_blocks(x: Tensor, y: Tensor, blocks: Tensor) -> Tensor:
    """The blocks (n, K, K) of xᵀ y on the diagonal, for rows x and y (..., d), in the dtype of `blocks`."""
    n, K, _ = blocks.shape
    left, right = x.reshape(-1, n, K).permute(1, 2, 0), y.reshape(-1, n, K).transpose(0, 1)
    return torch.bmm(left.to(blocks.dtype), right.to(blocks.dtype))


def dense(blocks: Tensor) -> Tensor:
    """The super-blocks (n, K, K) as one matrix B, (d, d)."""
    return torch.block_diag(*blocks)
