"""Strength, per-factor strength, weighted combination and dropout."""

import pytest
import torch
from dense import dense_rotation, net, randomize
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from boft import BOFTConfig, BOFTLayer, add_weighted_adapter, set_strength
from boft.cayley import cayley, skew
from boft.layer import draw_kept_blocks
from boft.rotation import compose, dense

TARGETS = ["first", "second", "conv"]


def config(b=4, m=1, targets=TARGETS, **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets), **kwargs)


def adapted(m=2, b=4, targets=("first", "second")):
    return randomize(get_peft_model(net(dtype=torch.float64), config(b, m, targets)).eval())


def first_layer(model):
    return next(module for module in model.modules() if isinstance(module, BOFTLayer))


def effective(layer, W):
    """The weight that a linear layer applies, measured from outside."""
    x = torch.eye(layer.in_features, dtype=W.dtype)
    return (layer(x) - layer.bias).T


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -1.0, 2.0])
def test_strength_scales_the_angle_and_stays_a_rotation(alpha):
    model = adapted()
    layer = first_layer(model)
    W, R, s = layer.weight, layer.boft_R["default"], layer.boft_s["default"]
    set_strength(model, alpha)
    expected = (1 + alpha * (s - 1)) * (W @ dense_rotation(alpha * R).T)
    torch.testing.assert_close(effective(layer, W), expected)
    with torch.no_grad():
        torch.testing.assert_close(effective(layer, W), expected)
        model.merge_adapter()
        torch.testing.assert_close(effective(layer, W), expected)


def test_strength_zero_is_the_base_model_bit_for_bit_and_one_the_adapter():
    base, x = net(), torch.randn(5, 32)
    expected = base(x)
    model = randomize(get_peft_model(base, config()))
    full = model(x)
    set_strength(model, 0)
    assert torch.equal(model(x), expected)
    set_strength(model, 1)
    assert torch.equal(model(x), full)


def test_negative_strength_is_the_inverse_rotation():
    B = dense(compose(cayley(skew(R := torch.randn(1, 4, 4, 4).double()))))
    torch.testing.assert_close(B @ dense(compose(cayley(skew(-R)))), torch.eye(16).double())


def test_pefts_own_interface_to_strength():
    layer = first_layer(adapted())
    layer.set_scale("default", 0.5)
    layer.scale_layer(0.5)
    assert layer.scaling == {"default": 0.25}
    layer.unscale_layer(0.5)
    assert layer.scaling == {"default": 0.5}
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.0}
    layer.set_scale("absent", 3.0)
    with pytest.raises(ValueError, match=r"unscale_layer\(\)"):
        layer.unscale_layer(0)
    layer.merge()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        layer.set_scale("default", 0.5)


def test_factors_are_removed_one_by_one():
    model = adapted(m=3)
    layer = first_layer(model)
    R, s = layer.boft_R["default"], layer.boft_s["default"]
    for factors in ([1, 0, 1], [0, 0, 0], [0.5, 1, 0.25]):
        set_strength(model, factors)
        scaled = torch.stack([alpha * factor for alpha, factor in zip(factors, R)])
        torch.testing.assert_close(effective(layer, layer.weight), s * (layer.weight @ dense_rotation(scaled).T))
    with pytest.raises(ValueError, match="m=3 factors"):
        set_strength(model, [1, 1])
    with pytest.raises(ValueError, match="'absent' is on no BOFT layer"):
        set_strength(model, 1.0, "absent")


def test_weighted_adapter_combines_in_the_lie_algebra():
    model = adapted()
    model.add_adapter("other", config(4, 2, ["first"]))
    randomize(model, seed=5)
    layer = first_layer(model)
    set_strength(model, 0.5, "other")
    x = torch.randn(5, 32, dtype=torch.float64)
    before = model(x)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mixed")
    torch.testing.assert_close(model(x), before)  # what is active stays active
    R = 0.7 * layer.boft_R["default"] - 0.2 * layer.boft_R["other"]
    s = 1 + 0.7 * (layer.boft_s["default"] - 1) - 0.2 * (layer.boft_s["other"] - 1)
    model.set_adapter("mixed")
    torch.testing.assert_close(effective(layer, layer.weight), s * (layer.weight @ dense_rotation(R).T))
    assert "mixed" in model.base_model.model.second.boft_R  # a layer that only one of the two is on


def test_weighting_one_adapter_is_its_strength(tmp_path):
    model = adapted()
    x = torch.randn(5, 32, dtype=torch.float64)
    model.add_weighted_adapter(["default"], [0.3], "weak")
    set_strength(model, 0.3)
    expected = model(x)
    model.set_adapter("weak")
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path, selected_adapters=["weak"])
    other = get_peft_model(net(dtype=torch.float64), config(8, 1, ["first"]), adapter_name="unrelated")
    other.load_adapter(tmp_path / "weak", "weak", autocast_adapter_dtype=False)
    other.set_adapter("weak")
    torch.testing.assert_close(other.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_weighted_adapter_on_an_injected_model():
    model = net(dtype=torch.float64)
    inject_adapter_in_model(config(4, 2, ["first"]), model, "a")
    inject_adapter_in_model(config(4, 2, ["first"]), model, "b")
    randomize(model)
    x = torch.randn(5, 32, dtype=torch.float64)
    model.first.set_adapter("a")
    expected = model(x)
    add_weighted_adapter(model, ["a", "b"], [1.0, 0.0], "c")
    assert model.first.active_adapters == ["a"]
    model.first.set_adapter("c")
    torch.testing.assert_close(model(x), expected)


def test_combinations_that_make_no_sense_are_refused():
    model = adapted()
    model.add_adapter("wide", config(8, 1, ["first"]))
    with pytest.raises(ValueError, match=r"first: .*'default' .*\(2, 8, 4\).*'wide' .*\(1, 4, 8\)"):
        model.add_weighted_adapter(["default", "wide"], [1, 1], "mixed")
    with pytest.raises(ValueError, match="one weight for each"):
        model.add_weighted_adapter(["default"], [1, 1], "mixed")
    with pytest.raises(ValueError, match=r"'absent'.* do not exist"):
        model.add_weighted_adapter(["absent"], [1], "mixed")
    with pytest.raises(ValueError, match="exists already"):
        model.add_weighted_adapter(["default"], [1], "wide")
    with pytest.raises(ValueError, match="finite"):
        model.add_weighted_adapter(["default"], [float("nan")], "mixed")
    assert set(model.peft_config) == {"default", "wide"}


def test_dropout_replaces_the_share_of_blocks_that_is_asked_for():
    model = randomize(get_peft_model(net(), config(4, 3, ["first"], boft_dropout=0.1))).train()
    layer, draws = first_layer(model), []
    for seed in range(500):
        torch.manual_seed(seed)
        draws.append(cayley(skew(layer.solvable("default").detach())))
    draws, Q = torch.stack(draws), cayley(skew(layer.boft_R["default"].detach()))
    dropped = (draws == torch.eye(4)).all(-1).all(-1)  # (500, 3, 8)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.012)
    assert dropped.float().mean((0, 2)).min() > 0.07  # every factor, every block
    assert dropped.float().mean((0, 1)).min() > 0.05
    torch.testing.assert_close(draws[~dropped], Q.expand_as(draws)[~dropped])


@pytest.mark.parametrize("hooked", [True, False], ids=["model", "layer alone"])
def test_dropout_acts_in_training_only(hooked):
    model = randomize(get_peft_model(net(), config(4, 2, ["first"], boft_dropout=0.3)))
    run, x = (model, torch.randn(5, 32)) if hooked else (first_layer(model), torch.randn(5, 32))
    model.train()
    assert not torch.equal(run(x), run(x))
    model.eval()
    assert torch.equal(run(x), run(x))
    layer = first_layer(model)
    R = layer.boft_R["default"]
    B = dense(compose(cayley(skew(R * draw_kept_blocks(R, 0.5)))))
    torch.testing.assert_close(B @ B.T, torch.eye(32), rtol=0, atol=1e-5)


def test_dropped_blocks_receive_no_gradient():
    model = randomize(get_peft_model(net(), config(4, 1, ["first"], boft_dropout=0.5)))
    model.train()
    torch.manual_seed(3)
    nn.functional.mse_loss(model(torch.randn(20, 32)), torch.randn(20, 3)).backward()
    touched = first_layer(model).boft_R["default"].grad.abs().amax((0, 2, 3)) > 0
    assert 0 < touched.sum() < 8
