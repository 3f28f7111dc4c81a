"""The layers in a model: what they compute, merge, save and load."""

import copy
import warnings

import pytest
import torch
from dense import dense_linear, dense_rotation, net, randomize
from peft import PeftModel, get_peft_model
from torch import nn

from boft import BOFTConfig, BOFTLayer

TARGETS = ["first", "second", "conv"]


def config(b=4, m=1, targets=TARGETS, **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets), **kwargs)


def adapted(b=4, m=2, dtype=torch.float32, targets=("first", "second"), **kwargs):
    return get_peft_model(net(dtype=dtype), config(b, m, targets, **kwargs)).eval()


def layers(model):
    return {name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, BOFTLayer)}


@pytest.mark.parametrize("m", [1, 2, 3])
def test_layer_equals_the_dense_reference(m):
    model = randomize(adapted(4, m, torch.float64))
    layer = layers(model)["first"]
    R, s = layer.boft_R["default"], layer.boft_s["default"]
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense_linear(x, R, s, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected)
    for computed, true in zip(
        torch.autograd.grad(y.square().sum(), [x, R, s]), torch.autograd.grad(expected.square().sum(), [x, R, s])
    ):
        torch.testing.assert_close(computed, true)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("rows", [2, 5, 50, 500])
def test_fresh_adapter_changes_nothing_bit_for_bit(rows, grad):
    x = torch.randn(rows, 32)
    base = net()
    expected = base(x)
    model = get_peft_model(base, config())
    with torch.set_grad_enabled(grad):
        assert torch.equal(model(x), expected)


def test_parameters_have_pefts_names_and_shapes_and_the_dtype_that_is_asked_for():
    model = get_peft_model(net(), config(4, 1))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {
        "base_model.model.first.boft_R.default": (1, 8, 4, 4),
        "base_model.model.first.boft_s.default": (48, 1),
        "base_model.model.second.boft_R.default": (1, 12, 4, 4),
        "base_model.model.second.boft_s.default": (64, 1),
        "base_model.model.conv.boft_R.default": (1, 9, 4, 4),
        "base_model.model.conv.boft_s.default": (1, 8),
    }
    half = get_peft_model(net(dtype=torch.bfloat16), config(4, 1), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(safe_merge):
    model = randomize(get_peft_model(net(), config()))
    x = torch.randn(9, 32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        unmerged = model(x)
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(model(x), unmerged)
        model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(model(x), unmerged)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=safe_merge)(x), unmerged)


def test_disabled_adapter_is_the_base_model_bit_for_bit():
    base = net()
    x = torch.randn(9, 32)
    expected = base(x)
    model = randomize(get_peft_model(base, config()))
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model.unload()(x), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("change", ["disabled", "merged"])
def test_layer_disabled_or_merged_within_a_forward_pass_is_its_base_layer(change, grad):
    model = randomize(adapted(4, 2))
    x = torch.randn(9, 32)
    first, second = layers(model)["first"], layers(model)["second"]
    seen = []
    first.register_forward_hook(lambda *_: second.merge() if change == "merged" else second.enable_adapters(False))
    second.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # the second call finds a rotated weight where nothing trains
            second.enable_adapters(True)
            model(x)
            (given, output) = seen.pop()
            assert torch.equal(output, second.base_layer(given))
            if change == "merged":
                second.unmerge()


def test_saved_adapter_loads_with_equal_outputs(tmp_path):
    model = randomize(adapted(4, 3))
    x = torch.randn(6, 32)
    expected = model(x)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(x), expected)
        assert not any(p.requires_grad for p in loaded.parameters())


def test_two_adapters_of_different_shapes_on_one_layer():
    model = randomize(adapted(4, 2, torch.float64))
    model.add_adapter("other", config(8, 1, ["first"]))
    randomize(model, seed=1)
    layer = layers(model)["first"]
    W = layer.weight.clone()
    x = torch.randn(5, 32, dtype=torch.float64)
    B1, B2 = (dense_rotation(layer.boft_R[name]) for name in ("default", "other"))
    s1, s2 = (layer.boft_s[name].flatten() for name in ("default", "other"))

    def expected(B, s):
        return x @ B @ W.T * s + layer.bias

    torch.testing.assert_close(layer(x), expected(B1, s1))
    model.set_adapter("other")
    torch.testing.assert_close(layer(x), expected(B2, s2))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), expected(B2 @ B1, s1 * s2))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(B2 @ B1, s1 * s2))
    model.merge_adapter()
    torch.testing.assert_close(layer(x), expected(B2 @ B1, s1 * s2))
    model.unmerge_adapter()
    model.delete_adapter("other")
    torch.testing.assert_close(layer(x), expected(B1, s1))
    assert not torch.allclose(expected(B1, s1), expected(B2 @ B1, s1 * s2))


def test_merging_one_adapter_after_the_other_equals_merging_both():
    model = randomize(adapted(4, 2))
    model.add_adapter("other", config(8, 1, ["first"]))
    randomize(model, seed=1)
    x = torch.randn(5, 32)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    before = layers(model)["first"].weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that one is merged already
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    assert torch.equal(layers(model)["first"].weight, before)


@pytest.mark.parametrize("names", [["other"], ["default", "other"]], ids=" and ".join)
def test_merge_and_unload_takes_the_named_adapters_only(names, capsys):
    model = randomize(adapted(4, 2))
    model.add_adapter("other", config(8, 1, ["first"]))
    randomize(model, seed=1)
    x = torch.randn(5, 32)
    model.base_model.set_adapter(names)
    expected = model(x)
    model.set_adapter("default")
    assert not torch.allclose(model(x), expected)
    plain = model.merge_and_unload(progressbar=True, safe_merge=True, adapter_names=names)
    assert not any(isinstance(module, BOFTLayer) for module in plain.modules())
    torch.testing.assert_close(plain(x), expected)
    assert "100%" in capsys.readouterr().err


def test_frozen_scale_does_not_train_and_survives_switching(tmp_path):
    model = get_peft_model(net(), config(boft_train_scale=False))

    def trainable():
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}

    assert trainable() == {"boft_R"}
    model.add_adapter("other", config(8, 1, ["first"]))
    model.set_adapter("other")
    assert trainable() == {"boft_R", "boft_s"}
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert trainable() == {"boft_R"}
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    choice = BOFTConfig.from_pretrained(tmp_path, boft_train_scale=False)
    loaded = PeftModel.from_pretrained(net(), tmp_path, config=choice, is_trainable=True)
    assert {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad} == {"boft_R"}


def test_two_steps_of_training_reach_every_parameter():
    model = get_peft_model(net(), config(4, 1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(32, 32), torch.randint(0, 3, (32,))
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad.abs().sum() > 0, name


def test_copy_after_a_training_step_computes_the_same():
    model = randomize(get_peft_model(net(), config()))
    x = torch.randn(4, 32)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert twin(x).abs().sum() > 0


def test_shapes_that_do_not_fit_are_all_named_before_anything_is_replaced():
    base = net()
    with pytest.raises(ValueError, match=r"first: .*b=20 .*m=1 .*d=32.*b=16 or 32.*second: .*d=48") as error:
        get_peft_model(base, config(20, 1))
    assert "conv: " in str(error.value)
    assert type(base.first) is nn.Linear
    with pytest.raises(
        ValueError, match=r"first.*b=8 with boft_n_butterfly_factor m=4.*b=4 with m=4, or m=3 with b=8"
    ):
        get_peft_model(base, config(8, 4, ["first"]))
    with pytest.raises(ValueError, match=r"D=6.*D=4 or 8 with m=1"):
        settings = BOFTConfig(boft_block_size=0, boft_block_num=6, target_modules=["first"])
        get_peft_model(base, settings)
