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

from boft.tracing import is_traced


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
    C, *others = Q.unbind()  # (D, b, b) each; unlike Q[0], its gradient is not first a Q of zeros
    join = _join_plainly if is_traced(Q) else _Join.apply
    for i, factor in enumerate(others, start=1):
        C = join(C, factor, i)
    return C


def _join_plainly(C: Tensor, Q: Tensor, i: int) -> Tensor:
    """One step of the composition, see `_Join`, in plain differentiable operations."""
    (D, b, _), s, k = Q.shape, 2**i, C.shape[-1]
    rows = C.reshape(D // s, 2, s, b // 2, k).transpose(1, 2).reshape(D, 2, b // 2, k)  # (g q) h' t' c
    product = Q.unflatten(-1, (2, b // 2)).transpose(1, 2) @ rows  # (g q) h' (h t) c
    joined = product.reshape(D // s, s, 2, 2, b // 2, k).permute(0, 3, 1, 4, 2, 5)  # g h q t h' c
    return joined.reshape(D // s, 2 * k, 2 * k)


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
    return from_groups(torch.bmm(in_groups(x, blocks), blocks), x.shape, x.dtype)


def in_groups(x: Tensor, blocks: Tensor) -> Tensor:
    """Rows x (..., d) as (n, T, K), in the dtype of super-blocks (n, K, K)."""
    n, K, _ = blocks.shape
    groups = x.reshape(-1, n, K).transpose(0, 1)
    return groups if x.dtype == blocks.dtype else groups.to(blocks.dtype)


def from_groups(z: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """(n, T, K) as rows (..., d) of a shape, in row-major order."""
    if z.dtype == dtype:
        return z.transpose(0, 1).reshape(shape)
    return z.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format).view(shape)


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
    return torch.bmm(in_groups(x, blocks).mT, in_groups(y, blocks))


def dense(blocks: Tensor) -> Tensor:
    """The super-blocks (n, K, K) as one matrix B, (d, d)."""
    return torch.block_diag(*blocks)
