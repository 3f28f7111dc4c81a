"""Products of activations with rotated weights, with gradients written by hand. Pure functions.

What is computed is  y = s ∘ (x B Wᵀ) + bias  for rows x, super-blocks of B, a frozen weight W and scales s. There are
two routes, equal up to rounding:

* activation side: z = x B, then z Wᵀ. Three grouped products of T · d · K (z, its gradient, that of B).
* weight side: W Bᵀ, then x (W Bᵀ)ᵀ. One grouped product of T · d · K, and two of o · d · K, which T does not enter.
  It needs B to be orthogonal: the gradient of x is dx = dz Bᵀ, so xᵀ dx B is xᵀ dz, the gradient of B.

T is the number of rows (tokens of the batch), o the number of outputs, K the size of a super-block.

What is saved is x, which layers on the same input share; on the weight side the rotated weight, which is smaller than
x there; and where s learns, the output, which the next operation mostly saves as well: the gradient of s is
Σ_t g (y - bias) / s. Where a scale is near 0, the unscaled output is saved instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from boft.rotation import (
    apply_blocks,
    from_groups,
    in_groups,
    outer_blocks,
    rotate_weight,
    rotate_weight_transposed,
)
from boft.tracing import is_traced

SMALLEST_DIVISOR = 0.25  # dividing by a smaller scale would amplify what rounding has left of an output and its bias


def can_divide(s: Tensor) -> bool:
    """Whether no scale is near 0. Not to be asked of a GPU, which would have to be waited for."""
    return bool((s.abs() >= SMALLEST_DIVISOR).all())


def rotated_linear(
    x: Tensor,
    blocks: Tensor,
    W: Tensor,
    s: Tensor,
    bias: Tensor | None,
    weight_side: bool | None = None,
    divides: bool = False,
    R: Tensor | None = None,
) -> Tensor:
    """y = s ∘ (x B Wᵀ) + bias, fast, for a weight that does not train.

    Args:
        x: Input, (..., d).
        blocks: Super-blocks of B, (d / K, K, K), in `dtype_of_products` of x. Orthogonal.
        W: Weight, (o, d), in the dtype of x. Receives no gradient.
        s: Scales, o elements in any shape, float32 or the dtype of x.
        bias: (o,) in the dtype of x, or None. Neither rotated nor scaled.
        weight_side: Which route; None = the cheaper one.
        divides: Whether `can_divide(s)` is known to be true, which makes s cheaper.
        R: Where m = 1, the stored parameters (1, d / K, K, K) that `blocks` are made of. They receive their gradient
            from here, and `blocks` none, where that costs less.

    Returns:
        (..., o) in the dtype of x.
    """
    if is_traced(x, blocks, s):
        return linear_reference(x, blocks, W, s, bias)
    T = x.numel() // x.shape[-1]
    if weight_side is None:
        weight_side = prefers_weight_side(T, W.shape[0], x.requires_grad)
    if R is not None and (weight_side or not prefers_short_gradient(T, blocks.shape[-1], x.requires_grad)):
        R = None
    # The output is kept without being a saved tensor (see below), so that it would escape those who handle saved
    # tensors themselves: gradient checkpointing and offloading.
    divides = divides and not has_saved_tensors_hooks()
    return _RotatedLinear.apply(x, blocks, W, s, bias, weight_side, divides, R)


def has_saved_tensors_hooks() -> bool:
    """Whether hooks of `torch.autograd.graph.saved_tensors_hooks` are at work."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def prefers_weight_side(T: int, o: int, input_needs_grad: bool) -> bool:
    """Whether rotating the weight costs less than rotating T rows of activations, forward and backward together.

    Grouped products in units of d · K, and as much for each pass over activations that the weight side has not: 5 T
    (z, dx, their rows put together, and the gradient of B) or 3 T on the activation side, T + 2 o on the weight side.
    """
    return (5 if input_needs_grad else 3) * T > T + 2 * o


def prefers_short_gradient(T: int, K: int, input_needs_grad: bool) -> bool:
    """Whether `gradients_of_input_and_parameters` costs less than the gradient of the Cayley transform.

    Grouped products in units of d · K: the rotated activations once more, and the gradient of x if nothing else needs
    it, of T each; two of K otherwise. Half of these, because the former also pass over the activations.
    """
    return (1 if input_needs_grad else 2) * T <= K


def rotated_convolution(
    x: Tensor,
    blocks: Tensor,
    W: Tensor,
    s: Tensor,
    bias: Tensor | None,
    convolution: nn.Conv2d,
    divides: bool = False,
) -> Tensor:
    """A convolution whose filters are rotated, from patches: for few output positions, as against many outputs.

    The patch under a filter is a row in the order of the flattened filter, so that the convolution is `rotated_linear`
    on patches, on the activation side. The gradient of the filters, as large as they are, is never formed.

    Args:
        x: Input, (N, C, H, W).
        blocks: Super-blocks of B, (d / K, K, K), d = C · kh · kw, as in `rotated_linear`.
        W: Filters, (o, d), in the dtype of x. Receives no gradient.
        s: Scales, o elements; bias: (o,) or None.
        convolution: Gives the geometry. One group.
        divides: As in `rotated_linear`.

    Returns:
        (N, o, H', W')
    """
    c = convolution
    patches = F.unfold(padded(x, c), c.kernel_size, c.dilation, 0, c.stride).transpose(1, 2)  # (N, H' W', d)
    y = rotated_linear(patches, blocks, W, s, bias, weight_side=False, divides=divides)  # (N, H' W', o)
    return y.transpose(1, 2).contiguous().unflatten(-1, output_size(x, c))


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


def rotated_weight(blocks: Tensor, W: Tensor, s: Tensor, divides: bool = False) -> Tensor:
    """diag(s) W Bᵀ, (o, d), differentiable in the super-blocks and s, o elements; W (o, d) receives no gradient."""
    if is_traced(blocks, W, s):
        return (rotate_weight(W, blocks) * s.view(-1, 1)).to(W.dtype)
    return _RotatedWeight.apply(blocks, W, s, divides)


def scale_output(u: Tensor, s: Tensor, bias: Tensor | None, in_place: bool = False) -> Tensor:
    """s ∘ (u - bias) + bias, for outputs u (..., o) that contain the bias and scales s (o,); exactly u where s is 1.
    `in_place`: the result may be written to u."""
    out = u if in_place else None
    if bias is None:
        return torch.mul(u, s, out=out) if in_place or u.dtype == s.dtype else (u * s).to(u.dtype)
    offset = bias * (1 - s)
    if u.dtype == offset.dtype == s.dtype:
        return torch.addcmul(offset, u, s, out=out)
    return (u * s).add_(offset).to(u.dtype)


def linear_reference(x: Tensor, blocks: Tensor, W: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """The same as `rotated_linear` in plain differentiable operations: where operations are recorded or transformed
    (see `boft.tracing`), and for weights that train."""
    return scale_output(F.linear(apply_blocks(x, blocks), W, bias), s.flatten(), bias)


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, blocks, W, s, bias, weight_side, divides, R):
        # Reshaped in here, where it costs no node of the graph: there is one for each layer and step.
        ctx.s_shape, s = s.shape, s.reshape(-1)
        folds = weight_side and (divides or not ctx.needs_input_grad[3])  # s goes into the weight
        if weight_side:
            W = rotate_weight_transposed(W, blocks, s if folds else None)  # (d, o)
            u = F.linear(x, W.t(), bias)
        else:
            u = F.linear(apply_blocks(x, blocks), W, bias)
        keeps_u = ctx.needs_input_grad[3] and not divides
        y = u if folds else scale_output(u, s, bias, in_place=not keeps_u)
        ctx.weight_side, ctx.folds, ctx.output = weight_side, folds, None
        if ctx.needs_input_grad[3] and divides:
            # Not as a saved tensor: whoever writes on the output in place, as nn.ReLU(inplace=True) does, may.
            ctx.output, ctx.version = y.detach(), y._version
        ctx.save_for_backward(x, blocks, W, s, bias, u if keeps_u else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, blocks, W, s, bias, u = ctx.saved_tensors
        g = grad.reshape(-1, s.shape[0])  # (T, o)
        dx = dblocks = ds = dbias = dR = None

        needs_x, needs_blocks, _, needs_s, needs_bias, _, _, needs_R = ctx.needs_input_grad
        if bias is not None and (needs_s or needs_bias):
            dbias = g.sum(0, dtype=s.dtype)
        if needs_s:
            ds = _RotatedLinear.scale_gradient(ctx, x, blocks, W, s, bias, u, g, dbias)
        if needs_x or needs_blocks:
            if ctx.weight_side:
                dx = g @ (W if ctx.folds else W * s.to(W.dtype)).t()  # (T, d)
                if needs_blocks:
                    dblocks = outer_blocks(x, dx, blocks).bmm(blocks)
                dx = dx.view(x.shape) if needs_x else None
            else:
                dz = (g * s).to(W.dtype) @ W  # (T, d)
                if needs_R:
                    dx, dR = gradients_of_input_and_parameters(x, dz, blocks)
                elif needs_blocks:
                    dblocks = outer_blocks(x, dz, blocks)
                if needs_x and dx is None:
                    dx = apply_blocks(dz.view(x.shape), blocks.mT)
        dbias = dbias.to(bias.dtype) if needs_bias else None
        ds = None if ds is None else ds.view(ctx.s_shape)
        return dx, dblocks, None, ds, dbias, None, None, dR

    @staticmethod
    def scale_gradient(ctx, x, blocks, W, s, bias, u, g, dbias) -> Tensor:
        """Σ_t g (u - bias), (o,), for the unscaled output u."""
        y, ctx.output = ctx.output, None
        if u is None and (y is None or y._version != ctx.version):  # written on, or a second backward pass
            u = F.linear(x, W.t()) if ctx.weight_side else F.linear(apply_blocks(x, blocks), W)
            return (g * u.view(g.shape)).sum(0, dtype=s.dtype) / (s if ctx.folds else 1)
        ds = (g * (y if u is None else u).reshape(g.shape)).sum(0, dtype=s.dtype)
        ds = ds if bias is None else ds - bias * dbias
        return ds / s if u is None else ds


def gradients_of_input_and_parameters(x: Tensor, dz: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient dz of z = x Q, Q = 2 X - I the Cayley transform of R, X = (I + S)⁻¹: that of x, and that of R
    without a product of K³.

    The gradient of S is -2 Xᵀ (xᵀ dz) Xᵀ = -2 (x X)ᵀ (dz Xᵀ), and 2 x X = z + x, 2 dz Xᵀ = dx + dz.

    Args:
        x, dz: (..., d), (T, d). blocks: Q, (n, K, K), d = n · K.

    Returns:
        dx, as x, and the gradient of R, (1, n, K, K), float32 or float64.
    """
    rows, dz_rows = in_groups(x, blocks), in_groups(dz, blocks)  # (n, T, K)
    dx_rows = torch.bmm(dz_rows, blocks.mT)
    dx = from_groups(dx_rows, x.shape, dz.dtype)
    z_rows = torch.bmm(rows, blocks)
    product = torch.bmm(z_rows.add_(rows).mul_(0.25).mT, dx_rows + dz_rows)  # gradient of S, times -1/2
    product = product if product.dtype == torch.float64 else product.float()
    return dx, torch.sub(product.mT, product, out=torch.empty_like(product))[None]


class _RotatedWeight(torch.autograd.Function):
    """Saves its result, which the operation that takes it for a weight does as well."""

    @staticmethod
    def forward(ctx, blocks, W, s, divides):
        ctx.s_shape, s = s.shape, s.reshape(-1)
        result = rotate_weight(W, blocks).mul_(s[:, None])
        ctx.divides = divides
        ctx.save_for_backward(blocks, None if divides else W, s, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        blocks, W, s, result = ctx.saved_tensors
        dblocks = ds = None
        if ctx.needs_input_grad[0]:
            dblocks = outer_blocks(grad, result, blocks).bmm(blocks)
        if ctx.needs_input_grad[2]:
            ds = (grad * (result if ctx.divides else rotate_weight(W, blocks))).sum(1, dtype=s.dtype)
            ds = (ds / s if ctx.divides else ds).view(ctx.s_shape)
        return dblocks, None, ds, None
