"""Products of activations with rotated weights, with gradients written by hand. Pure functions.

What is computed is  y = s ∘ (x B Wᵀ) + bias  for rows x, super-blocks of B, a frozen weight W and scales s. There are
two routes, equal up to rounding:

* activation side: z = x B, then z Wᵀ. Three grouped products of T · d · K (z, its gradient, that of B).
* weight side: W Bᵀ, then x (W Bᵀ)ᵀ. One grouped product of T · d · K, and two of o · d · K, which T does not enter.
  It needs B to be orthogonal: the gradient of x is dx = dz Bᵀ, so xᵀ dx B is xᵀ dz, the gradient of B.

T is the number of rows (tokens of the batch), o the number of outputs, K the size of a super-block. Only x is saved,
which layers on the same input share, and the unscaled output where s learns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from boft.rotation import apply_blocks, rotate_weight


def rotated_linear(
    x: Tensor, blocks: Tensor, W: Tensor, s: Tensor, bias: Tensor | None, weight_side: bool | None = None
) -> Tensor:
    """y = s ∘ (x B Wᵀ) + bias, fast, for a weight that does not train.

    Args:
        x: Input, (..., d).
        blocks: Super-blocks of B, (d / K, K, K), in the dtype of x. Orthogonal.
        W: Weight, (o, d), in the dtype of x. Receives no gradient.
        s: Scales, (o,), float32 or the dtype of x.
        bias: (o,) in the dtype of x, or None. Neither rotated nor scaled.
        weight_side: Which route; None = the cheaper one.

    Returns:
        (..., o) in the dtype of x.
    """
    if weight_side is None:
        weight_side = prefers_weight_side(x.numel() // x.shape[-1], W.shape[0], x.requires_grad)
    return _RotatedLinear.apply(x, blocks, W, s, bias, weight_side)


def prefers_weight_side(T: int, o: int, input_needs_grad: bool) -> bool:
    """Whether rotating the weight costs less than rotating T rows of activations, forward and backward together.

    Grouped products in units of d · K: (3 T or 2 T) on the activation side, T + 2 o on the weight side.
    """
    return (3 if input_needs_grad else 2) * T > T + 2 * o


def rotated_convolution(
    x: Tensor, blocks: Tensor, W: Tensor, s: Tensor, bias: Tensor | None, convolution: nn.Conv2d
) -> Tensor:
    """A convolution whose filters are rotated, from patches: for few output positions, as against many outputs.

    The patch under a filter is a row in the order of the flattened filter, so that the convolution is `rotated_linear`
    on patches, on the activation side. The gradient of the filters, as large as they are, is never formed.

    Args:
        x: Input, (N, C, H, W).
        blocks: Super-blocks of B, (d / K, K, K), d = C · kh · kw, in the dtype of x.
        W: Filters, (o, d), in the dtype of x. Receives no gradient.
        s: Scales, (o,); bias: (o,) or None.
        convolution: Gives the geometry. One group.

    Returns:
        (N, o, H', W')
    """
    c = convolution
    patches = F.unfold(padded(x, c), c.kernel_size, c.dilation, 0, c.stride).transpose(1, 2)  # (N, H' W', d)
    y = rotated_linear(patches, blocks, W, s, bias, weight_side=False).transpose(1, 2).contiguous()  # (N, o, H' W')
    return y.unflatten(-1, output_size(x, c))


def padded(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """The input with the convolution's padding, of any mode, around it."""
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    widths = convolution._reversed_padding_repeated_twice  # left, right, top, bottom
    return F.pad(x, widths, mode=mode) if any(widths) else x


def output_size(x: Tensor, convolution: nn.Conv2d) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    c, (left, right, top, bottom) = convolution, convolution._reversed_padding_repeated_twice
    sizes = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    return tuple(
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, dilation, stride in zip(sizes, c.kernel_size, c.dilation, c.stride)
    )


def rotated_weight(blocks: Tensor, W: Tensor, s: Tensor) -> Tensor:
    """diag(s) W Bᵀ, (o, d), differentiable in the super-blocks and s; W (o, d) receives no gradient."""
    return _RotatedWeight.apply(blocks, W, s)


def scale_output(u: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """s ∘ (u - bias) + bias, for outputs u (..., o) that contain the bias; exactly u where s is 1."""
    if bias is None:
        return (u * s).to(u.dtype)
    offset = bias * (1 - s)
    if u.dtype == offset.dtype == s.dtype:
        return torch.addcmul(offset, u, s)
    return (u * s).add_(offset).to(u.dtype)


def linear_reference(x: Tensor, blocks: Tensor, W: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """The same as `rotated_linear` in plain differentiable operations: for `torch.compile`, which writes its own
    backward, and for weights that train."""
    return scale_output(F.linear(apply_blocks(x, blocks), W, bias), s, bias)


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, blocks, W, s, bias, weight_side):
        if weight_side:
            u = F.linear(x, rotate_weight(W, blocks), bias)
        else:
            u = F.linear(apply_blocks(x, blocks), W, bias)
        ctx.weight_side = weight_side
        ctx.save_for_backward(x, blocks, W, s, bias, u if ctx.needs_input_grad[3] else None)
        return scale_output(u, s, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, blocks, W, s, bias, u = ctx.saved_tensors
        (n, K, _), o = blocks.shape, W.shape[0]
        g = grad.reshape(-1, o)  # (T, o)
        dx = dblocks = ds = dbias = None

        needs_x, needs_blocks, _, needs_s, needs_bias, _ = ctx.needs_input_grad
        if bias is not None and (needs_s or needs_bias):
            dbias = g.sum(0, dtype=s.dtype)
        if needs_s:
            ds = (g * u.reshape(-1, o)).sum(0, dtype=s.dtype)
            ds = ds if bias is None else ds - bias * dbias
        if needs_x or needs_blocks:
            columns = x.reshape(-1, n, K).permute(1, 2, 0)  # (n, K, T), a view
            if ctx.weight_side:
                dx = g @ rotate_weight(W, blocks).mul_(s[:, None])  # (T, d)
                if needs_blocks:
                    dblocks = torch.bmm(columns, dx.view(-1, n, K).transpose(0, 1)) @ blocks
                dx = dx.view(x.shape)
            else:
                dz = (g * s).to(W.dtype) @ W  # (T, d)
                if needs_blocks:
                    dblocks = torch.bmm(columns, dz.view(-1, n, K).transpose(0, 1))
                if needs_x:
                    dx = apply_blocks(dz, blocks.mT).view(x.shape)
        return dx if needs_x else None, dblocks, None, ds, dbias.to(bias.dtype) if needs_bias else None, None


class _RotatedWeight(torch.autograd.Function):
    """Saves nothing of the size of W: what the gradient of s needs is rotated again."""

    @staticmethod
    def forward(ctx, blocks, W, s):
        ctx.save_for_backward(blocks, W, s)
        return rotate_weight(W, blocks).mul_(s[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        blocks, W, s = ctx.saved_tensors
        n, K, _ = blocks.shape
        dblocks = ds = None
        if ctx.needs_input_grad[0]:
            rows = (grad * s[:, None]).to(W.dtype).view(-1, n, K).permute(1, 2, 0)  # (n, K, o)
            dblocks = torch.bmm(rows, W.reshape(-1, n, K).transpose(0, 1))
        if ctx.needs_input_grad[2]:
            ds = (grad * rotate_weight(W, blocks)).sum(1, dtype=s.dtype)
        return dblocks, None, ds
