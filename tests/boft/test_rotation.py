"""The mathematics: composed super-blocks against dense matrices, values and gradients, in float64."""

import pytest
import torch
from dense import dense_linear, dense_rotation

import boft.cayley
import boft.super_blocks
from boft.cayley import cayley, skew
from boft.functional import (
    linear_reference,
    prefers_short_gradient,
    prefers_weight_side,
    rotated_linear,
    rotated_weight,
)
from boft.rotation import apply_blocks, apply_factor, compose, dense, rotate_weight
from boft.super_blocks import CHUNK_BYTES, LARGEST_BLOCK, all_super_blocks, super_blocks

# (d, b, m): one factor, odd and single blocks, two to full depth, blocks of 2, one super-block and several
SHAPES = [
    (12, 3, 1),
    (8, 8, 1),
    (32, 8, 1),
    (16, 4, 2),
    (48, 4, 3),
    (48, 6, 2),
    (16, 2, 4),
    (32, 4, 4),
    (64, 8, 4),
    (96, 6, 5),
    (40, 10, 3),
]
# solved with the batch in the last axis in these tests, for which 8 groups are enough
LARGER_SHAPES = [(32, 4, 1), (45, 5, 1), (96, 6, 2), (128, 4, 3), (640, 8, 4), (512, 4, 5), (480, 12, 2)]


def parameters(d, b, m, seed=0, std=0.5):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(m, d // b, b, b, dtype=torch.float64, generator=generator)


def blocks_of(R):
    return compose(cayley(skew(R)))


@pytest.fixture
def few_are_enough(monkeypatch):
    monkeypatch.setattr(boft.super_blocks, "SMALLEST_BATCH", 8)


@pytest.mark.parametrize("d, b, m", LARGER_SHAPES)
@pytest.mark.parametrize("std", [0.0, 0.5, 30.0], ids=["fresh", "trained", "large"])
def test_batch_last_is_the_definition(d, b, m, std, few_are_enough):
    assert b <= LARGEST_BLOCK and d // b >= 8 << (m - 1)
    R = parameters(d, b, m, std=std).requires_grad_()
    fast, slow = super_blocks(R), blocks_of(R)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    assert torch.equal(fast, slow) or std > 0  # a fresh adapter is the identity to the bit
    weights = torch.randn_like(slow)
    fast, slow = (torch.autograd.grad((blocks * weights).sum(), R)[0] for blocks in (fast, slow))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("elimination", [False, True])
@pytest.mark.parametrize("b", [15, 20, 65, 160])
@pytest.mark.parametrize("std", [0.1, 30.0], ids=["trained", "large"])
def test_large_blocks_are_inverted_by_halves(b, std, elimination, monkeypatch):
    if elimination:  # of the smallest parts, or else by LAPACK
        monkeypatch.setattr(boft.cayley, "SMALLEST_BATCH", 1)
    S = skew(parameters(2 * b, b, 1, std=std))
    I = torch.eye(b, dtype=S.dtype)
    torch.testing.assert_close(cayley(S), (I - S) @ torch.linalg.inv(I + S), rtol=0, atol=1e-10)
    torch.testing.assert_close(cayley(S.float()), cayley(S).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("b, m", [(4, 2), (16, 1), (80, 1)])  # large blocks take a way of their own
def test_layers_together_are_each_layer_alone(b, m):
    layers = [parameters(D * b, b, m, seed=D).requires_grad_() for D in (2, 4, 2)]
    together, alone = all_super_blocks(layers), [blocks_of(R) for R in layers]
    for fast, slow in zip(together, alone):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    weights = torch.randn_like(alone[1])  # the others take no part in the loss
    fast = torch.autograd.grad((together[1] * weights).sum(), layers, allow_unused=True)
    (slow,) = torch.autograd.grad((alone[1] * weights).sum(), layers[1])
    torch.testing.assert_close(fast[1], slow, rtol=1e-9, atol=1e-11)
    assert all(grad is None or not grad.any() for grad in (fast[0], fast[2]))


@pytest.mark.parametrize("m", [1, 2, 4])
def test_chunks_of_a_large_batch_join_without_a_seam(m):
    b, P = 4, 2 ** (m - 1)
    G = 2 * CHUNK_BYTES // (m * P * b * b * 8) + 5
    R = parameters(G * P * b, b, m).requires_grad_()
    fast, slow = super_blocks(R), blocks_of(R)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    fast, slow = (torch.autograd.grad(blocks.pow(3).sum(), R)[0] for blocks in (fast, slow))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("d, b, m", SHAPES)
def test_super_blocks_are_the_dense_product(d, b, m):
    R = parameters(d, b, m)
    blocks = blocks_of(R)
    K = b * 2 ** (m - 1)
    assert blocks.shape == (d // K, K, K)
    torch.testing.assert_close(dense(blocks), dense_rotation(R), rtol=0, atol=1e-13)


@pytest.mark.parametrize("d, b, m", SHAPES)
def test_factors_one_by_one_give_the_same(d, b, m):
    R = parameters(d, b, m)
    Q, x = cayley(skew(R)), torch.randn(3, 5, d, dtype=torch.float64)
    z = x
    for i in reversed(range(m)):
        z = apply_factor(z, Q[i], i)
    torch.testing.assert_close(apply_blocks(x, compose(Q)), z)
    torch.testing.assert_close(z, x @ dense_rotation(R))


@pytest.mark.parametrize("d, b, m", [*SHAPES, *LARGER_SHAPES])
@pytest.mark.parametrize("std", [0.1, 3.0, 30.0])
def test_rotation_is_orthogonal(d, b, m, std, few_are_enough):
    B = dense(super_blocks(parameters(d, b, m, std=std)))
    assert (B @ B.T - torch.eye(d, dtype=B.dtype)).abs().max() < 1e-12
    B = dense(super_blocks(parameters(d, b, m, std=std).float()))
    assert (B @ B.T - torch.eye(d)).abs().max() < 2e-5


@pytest.mark.parametrize("smallest_batch", [1, 192])  # elimination, LAPACK
def test_zeros_are_the_identity_bit_for_bit(smallest_batch, monkeypatch):
    monkeypatch.setattr(boft.cayley, "SMALLEST_BATCH", smallest_batch)
    blocks = blocks_of(torch.zeros(3, 8, 4, 4))
    assert torch.equal(blocks, torch.eye(16).expand(2, 16, 16))
    for b in (15, 65, 160):
        assert torch.equal(blocks_of(torch.zeros(1, 2, b, b)), torch.eye(b).expand(2, b, b))


@pytest.mark.parametrize("b", [40, 80])  # by LAPACK and by halves
def test_gradient_of_blocks_that_lapack_or_halves_invert(b):
    R, weights = parameters(2 * b, b, 1).requires_grad_(), torch.randn(2, b, b, dtype=torch.float64)
    S, I = skew(R), torch.eye(b, dtype=torch.float64)
    reference = ((I - S) @ torch.linalg.inv(I + S)).flatten(0, 1)
    fast, slow = (torch.autograd.grad((Q * weights).sum(), R)[0] for Q in (blocks_of(R), reference))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_gradients_of_cayley_and_composition(m):
    R = parameters(8, 2, m).requires_grad_()
    assert torch.autograd.gradcheck(blocks_of, R)


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("weight_side", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(3,), (2, 40)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("d, b, m", SHAPES)
def test_fast_product_has_the_values_and_gradients_of_the_dense_one(d, b, m, rows, bias, weight_side, divides):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    o = 24
    R, W = parameters(d, b, m).requires_grad_(), randn(o, d)
    x, s = randn(*rows, d).requires_grad_(), (1 + 0.3 * randn(o)).requires_grad_()
    offset = randn(o).requires_grad_() if bias else None
    leaves = [x, R, s] + ([offset] if bias else [])
    weights = randn(*rows, o)

    expected = dense_linear(x, R, s, W, offset)
    fast = rotated_linear(x, blocks_of(R), W, s, offset, weight_side, divides)
    torch.testing.assert_close(fast, expected)
    torch.testing.assert_close(linear_reference(x, blocks_of(R), W, s, offset), expected)
    for computed, true in zip(
        torch.autograd.grad((fast * weights).sum(), leaves), torch.autograd.grad((expected * weights).sum(), leaves)
    ):
        torch.testing.assert_close(computed, true)


@pytest.mark.parametrize("input_learns", [False, True])
@pytest.mark.parametrize("d, b", [(32, 8), (48, 24), (80, 80)])
def test_gradient_of_few_rows_goes_to_the_parameters_without_that_of_the_blocks(d, b, input_learns):
    R, W = parameters(d, b, 1).requires_grad_(), torch.randn(10, d, dtype=torch.float64)
    x, s = torch.randn(2, 2, d, dtype=torch.float64), torch.linspace(0.5, 2, 10).double().requires_grad_()
    x, weights = x.requires_grad_(input_learns), torch.randn(2, 2, 10, dtype=torch.float64)
    leaves = [R, s, x] if input_learns else [R, s]
    true = torch.autograd.grad((dense_linear(x, R, s, W, None) * weights).sum(), leaves)

    blocks = blocks_of(R).detach().requires_grad_()
    y = rotated_linear(x, blocks, W, s, None, R=R)
    *computed, of_blocks = torch.autograd.grad((y * weights).sum(), [*leaves, blocks], allow_unused=True)
    assert of_blocks is None
    for fast, slow in zip(computed, true):
        torch.testing.assert_close(fast, slow)


def test_gradient_of_many_rows_goes_through_the_blocks():
    assert prefers_short_gradient(64, 160, input_needs_grad=True)
    assert not prefers_short_gradient(77, 96, input_needs_grad=False)
    R, W, x = parameters(32, 8, 1).requires_grad_(), torch.randn(10, 32).double(), torch.randn(9, 32).double()
    blocks = blocks_of(R).detach().requires_grad_()
    y = rotated_linear(x, blocks, W, torch.ones(10, dtype=torch.float64), None, weight_side=False, R=R)
    of_R, of_blocks = torch.autograd.grad(y.sum(), [R, blocks], allow_unused=True)
    assert of_R is None and of_blocks is not None


@pytest.mark.parametrize("weight_side", [False, True])
def test_the_output_may_be_written_on_and_gradients_taken_twice(weight_side):
    R, s = parameters(16, 4, 2).requires_grad_(), torch.linspace(0.5, 2, 6).double().requires_grad_()
    W, x = torch.randn(6, 16).double(), torch.randn(40, 16).double()
    expected = torch.autograd.grad(dense_linear(x, R, s, W, None).relu().square().sum(), [R, s])
    loss = rotated_linear(x, blocks_of(R), W, s, None, weight_side, divides=True).relu_().square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, [R, s], retain_graph=True), expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [R, s]), expected)


@pytest.mark.parametrize("weight_side", [False, True])
def test_only_the_gradients_that_are_asked_for(weight_side):
    R, W, x = parameters(16, 4, 2).requires_grad_(), torch.randn(6, 16).double(), torch.randn(40, 16).double()
    s = torch.ones(6, dtype=torch.float64)
    y = rotated_linear(x, blocks_of(R), W, s, None, weight_side)
    (computed,) = torch.autograd.grad(y.square().sum(), R)
    (true,) = torch.autograd.grad(dense_linear(x, R, s, W, None).square().sum(), R)
    torch.testing.assert_close(computed, true)


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("d, b, m", SHAPES)
def test_rotated_weight_has_the_gradients_of_the_dense_one(d, b, m, divides):
    R, W = parameters(d, b, m).requires_grad_(), torch.randn(10, d, dtype=torch.float64)
    s = torch.rand(10, dtype=torch.float64).requires_grad_()
    weights = torch.randn(10, d, dtype=torch.float64)
    expected = s[:, None] * (W @ dense_rotation(R).T)
    computed = rotated_weight(blocks_of(R), W, s, divides)
    torch.testing.assert_close(computed, expected)
    torch.testing.assert_close(rotate_weight(W, blocks_of(R)) * s[:, None], expected)
    for fast, true in zip(
        torch.autograd.grad((computed * weights).sum(), [R, s]),
        torch.autograd.grad((expected * weights).sum(), [R, s]),
    ):
        torch.testing.assert_close(fast, true)


def test_the_weight_is_rotated_where_rows_are_many():
    assert prefers_weight_side(4096, 320, input_needs_grad=True)
    assert not prefers_weight_side(64, 1280, input_needs_grad=True)
    assert not prefers_weight_side(77, 320, input_needs_grad=False)  # the prompt
