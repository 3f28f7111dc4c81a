"""Dtypes, merging in half precision, and every kind of convolution."""

import pytest
import torch
from dense import dense_rotation, net, randomize
from peft import get_peft_model
from torch import nn

from boft import BOFTConfig, BOFTLayer

TARGETS = ["first", "second", "conv"]


def adapted(dtype=torch.float32, std=0.1, **kwargs):
    config = BOFTConfig(boft_block_size=4, target_modules=TARGETS, **kwargs)
    return randomize(get_peft_model(net(dtype=dtype), config).eval(), std=std)


def dense_weight(layer, W):
    """diag(s) W Bᵀ in float64, in the shape of W."""
    R, s = layer.boft_R["default"].double(), layer.boft_s["default"].double().flatten()
    return (s[:, None] * (W.double().flatten(1) @ dense_rotation(R).T)).view(W.shape)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_half_and_trainables_in_float32(dtype, grad):
    model, x = adapted(dtype), torch.randn(8, 32, dtype=dtype)
    exact = adapted()(x.float())
    with torch.set_grad_enabled(grad):
        y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.03)
    if grad:
        y.float().square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_autocast_keeps_the_dtype_of_the_input(grad):
    model, x = adapted(), torch.randn(8, 32)
    with torch.set_grad_enabled(grad):
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            for layer in (model.base_model.model.first, model.base_model.model.second):
                rows = torch.randn(8, layer.in_features)
                assert layer(rows).dtype == torch.float32
                assert layer(rows.bfloat16()).dtype == torch.bfloat16
            torch.testing.assert_close(model(x).float(), exact, rtol=0.05, atol=0.05)
    if grad:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        assert model.base_model.model.first.boft_R["default"].grad.dtype == torch.float32


def test_small_scales_act_in_half_precision():
    model = adapted(torch.bfloat16, std=0)
    layer = model.base_model.model.second
    x = torch.randn(4096, 48, dtype=torch.bfloat16)
    base = layer(x).float()
    with torch.no_grad():
        layer.boft_s["default"].fill_(1.003)  # in bfloat16 this is 1
    ratio = (layer(x).float().abs().sum() / base.abs().sum()).item()
    assert ratio == pytest.approx(1.003, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_rounds_once_and_unmerging_restores_every_bit(dtype):
    model = adapted(dtype)
    layers = [module for module in model.modules() if isinstance(module, BOFTLayer)]
    with torch.no_grad():
        layers[0].boft_s["default"][0] = 0  # cannot be undone by a division
    before = [layer.weight.clone() for layer in layers]
    expected = [dense_weight(layer, W).to(dtype) for layer, W in zip(layers, before)]
    model.merge_adapter()
    for layer, W in zip(layers, expected):
        # the float32 product may fall on the other side of a rounding boundary, rarely
        assert (layer.weight != W).float().mean() < (1 if dtype == torch.float32 else 0.01)
        torch.testing.assert_close(layer.weight, W, rtol=0.01, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(layer.weight, W) for layer, W in zip(layers, before))


@pytest.mark.parametrize("name", ["first", "conv"])
def test_safe_merge_finds_values_that_are_not_finite(name):
    model = adapted()
    layer = getattr(model.base_model.model, name)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.boft_s["default"].view(-1)[1] = float("inf")
    with pytest.raises(ValueError, match="'default': the merged weight is not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "oblong": {"kernel_size": (2, 4), "stride": (2, 1), "padding": (0, 3), "bias": False},
    "same": {"kernel_size": (4, 2), "padding": "same"},
    "dilated": {"kernel_size": 2, "dilation": (2, 3), "stride": 2},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 4, "groups": 8},
}


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("patches", [False, True], ids=["by weight", "by patches"])
def test_convolution_equals_the_one_with_the_dense_weight(kind, m, patches):
    torch.manual_seed(0)
    base = nn.Conv2d(8, 144 if patches else 16, **CONVOLUTIONS[kind]).double()
    x = torch.randn(1 if patches else 2, 8, 9, 10, dtype=torch.float64, requires_grad=True)
    config = BOFTConfig(boft_block_size=4 if kind != "groups" else 2, boft_n_butterfly_factor=m, target_modules=["0"])
    if (base.weight[0].numel() // config.boft_block_size) % 2 ** (m - 1):
        pytest.skip(f"{base.weight[0].numel()} features do not hold m={m}")
    expected = base(x)
    model = get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    assert layer._prefers_patches(x, ["default"]) == (patches and base.groups == 1)
    if patches:  # in another order of additions
        torch.testing.assert_close(model(x), expected)
    else:
        assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)  # fresh

    randomize(model)
    R, s = layer.boft_R["default"], layer.boft_s["default"]
    y = model(x)
    expected = base._conv_forward(x, dense_weight(layer, base.weight), base.bias)
    torch.testing.assert_close(y, expected)
    for fast, true in zip(
        torch.autograd.grad(y.square().sum(), [x, R, s]), torch.autograd.grad(expected.square().sum(), [x, R, s])
    ):
        torch.testing.assert_close(fast, true)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
