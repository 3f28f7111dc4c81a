"""Merging and unmerging change all layers or none, and never what is not theirs."""

import copy
import pickle

import pytest
import torch
from dense import net, randomize
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from boft import BOFTConfig, BOFTLayer

TARGETS = ["first", "second", "conv"]


def config(b=4, m=1, targets=TARGETS, **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets), **kwargs)


@pytest.fixture
def model():
    model = randomize(get_peft_model(net(), config(), adapter_name="one"))
    model.add_adapter("two", config(8, 1, ["first", "second"]))
    return randomize(model, seed=3).eval()


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


def spoil(model, layer_name, adapter, value=float("nan")):
    with torch.no_grad():
        getattr(model.base_model.model, layer_name).boft_s[adapter].view(-1)[0] = value


def state(model):
    """Names, types, identities and values of all that a merge could change."""
    layers = [(name, type(module), id(module), getattr(module, "merged_adapters", None)) for name, module
              in model.named_modules()]  # fmt: skip
    return layers, [(name, id(p), p._version, p.clone()) for name, p in model.named_parameters()]


def assert_untouched(model, before):
    (layers, parameters), (old_layers, old_parameters) = state(model), before
    assert layers == old_layers
    for (*now, value), (*old, old_value) in zip(parameters, old_parameters):
        assert now == old and torch.equal(value.nan_to_num(7), old_value.nan_to_num(7))


@pytest.mark.parametrize("already", [[], ["one"]])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_that_refuses_changes_nothing(model, how, already, value):
    if already:
        model.merge_adapter(already)
    spoil(model, "second", "two", value)
    before = state(model)
    with torch.no_grad():
        y = model(X)
    with pytest.raises(ValueError, match=r"second: adapter .*two': the merged weight is not finite, nothing was"):
        getattr(model, how)(adapter_names=["one", "two"], safe_merge=True)
    assert_untouched(model, before)
    with torch.no_grad():
        assert torch.equal(model(X), y)


def test_a_layers_own_safe_merge_that_refuses_changes_nothing(model):
    layer = model.base_model.model.first
    layer.merge(adapter_names=["one"])
    spoil(model, "first", "two")
    before = state(model)
    with pytest.raises(ValueError, match="not finite"), pytest.warns(UserWarning, match="Already"):
        layer.merge(safe_merge=True, adapter_names=["two"])
    assert_untouched(model, before)


def test_values_that_are_not_finite_merge_where_nobody_asks_and_unmerge(model):
    spoil(model, "first", "one")
    before = model.base_model.model.first.weight.clone()
    model.merge_adapter(["one"])
    assert not model.base_model.model.first.weight.isfinite().all()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.first.weight, before)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_names_that_do_not_exist_are_refused(model, how):
    before = state(model)
    with pytest.raises(ValueError, match=r"adapters \['tow'\] do not exist; there are \['one', 'two'\]"):
        getattr(model, how)(adapter_names=["one", "tow"])
    with pytest.raises(TypeError, match=r"adapter_names='one' must be a list of names"):
        getattr(model, how)(adapter_names="one")
    assert_untouched(model, before)


# What shares a weight or a module


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("copied", [False, True])
def test_what_shares_the_base_weight_keeps_it(copied):
    torch.manual_seed(0)
    model, ids = randomize(get_peft_model(Tied(), config(targets=["head"]))).eval(), torch.arange(6)
    model = copy.deepcopy(model) if copied else model
    base = model.base_model.model
    with torch.no_grad():
        y, shared = model(ids), base.embedding.weight
        model.merge_adapter()
        torch.testing.assert_close(model(ids), y)
        assert base.embedding.weight is shared
        model.unmerge_adapter()
        assert base.head.base_layer.weight is shared and torch.equal(model(ids), y)
        torch.testing.assert_close(model.merge_and_unload()(ids), y)


def test_two_layers_with_one_weight():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model, x = randomize(get_peft_model(Both(), config(targets=["a", "b"]))).eval(), torch.randn(3, 16)
    with torch.no_grad():
        y = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), y)
        model.unmerge_adapter()
        assert model.base_model.model.a.weight is model.base_model.model.b.weight
        torch.testing.assert_close(model(x), y)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again = nn.Sequential(self.a)

    def forward(self, x):
        return self.c(self.again(torch.tanh(self.a(x))))


def test_a_module_at_two_places_is_not_merged():
    model, x = randomize(get_peft_model(Twice(), config(targets=["c", "a"]))).eval(), torch.randn(3, 16)
    y, before = model(x), state(model)
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.model.a.merge):
        with pytest.raises(ValueError, match=r"calls the same module as again\.0, too.*copy.deepcopy"):
            merge()
    assert_untouched(model, before)
    model.base_model.model.again[0] = copy.deepcopy(model.base_model.model.again[0])  # what the message says
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)


def test_injected_layers_know_other_places_too():
    base = inject_adapter_in_model(config(targets=["a"]), Twice())
    with pytest.raises(ValueError, match=r"again\.0"):
        base.a.merge()
    pickle.loads(pickle.dumps(base))


@pytest.mark.parametrize("outer", ["boft", "lora"])
def test_layers_with_adapters_of_two_methods_are_not_merged(outer):
    base, x = net(), torch.randn(3, 32)
    lora = LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    configs = [config(targets=["first"]), lora] if outer == "lora" else [lora, config(targets=["first"])]
    model = base
    for number, settings in enumerate(configs):
        model = get_peft_model(model, settings, adapter_name=f"adapter{number}")
    randomize(model)
    y = model(x).detach()
    tuner = model.base_model if outer == "boft" else model.base_model.model.base_model
    before = state(model)
    for merge in (tuner.merge_adapter, tuner.merge_and_unload):
        with pytest.raises(ValueError, match="an adapter of another method"):
            merge()
    assert_untouched(model, before)
    assert torch.equal(model(x), y)


# Unmerging


def load_in_place(base):
    base.load_state_dict({"weight": torch.randn_like(base.weight), "bias": base.bias.clone()})


def load_by_assignment(base):
    base.load_state_dict({"weight": torch.randn_like(base.weight), "bias": base.bias.clone()}, assign=True)


def write_through_data(base):
    base.weight.data.copy_(torch.randn_like(base.weight))


def assign_data(base):
    base.weight.data = torch.randn_like(base.weight)


def change_one_value(base):
    with torch.no_grad():
        base.weight.view(-1)[2] += 1


def train(base):
    base.weight.requires_grad_(True)
    base(torch.randn(2, 32)).sum().backward()
    torch.optim.SGD([base.weight], 0.1).step()


CHANGES = [load_in_place, load_by_assignment, write_through_data, assign_data, change_one_value, train]


@pytest.mark.parametrize("change", CHANGES)
def test_base_weights_that_come_while_merged_are_not_thrown_away(model, change):
    model.set_adapter("one")
    model.merge_adapter()
    base = model.base_model.model.first.base_layer
    change(base)
    before, y = state(model), model(X)
    with pytest.raises(ValueError, match=r"first: .*changed since they were merged.*call unload\(\)"):
        model.unmerge_adapter()
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="changed since"):
        model.base_model.model.first.unmerge()
    assert torch.equal(model.unload()(X), y)


def moved(model):
    return model.double().float()


def half_and_back(model):
    return model.bfloat16().float()


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def frozen(model):
    return model.requires_grad_(False)


def stays_half(model):
    return model.half()


@pytest.mark.parametrize("change", [moved, half_and_back, copied, pickled, frozen, stays_half])
def test_a_merged_model_that_is_cast_or_copied_unmerges(model, change):
    before = model.base_model.model.first.weight.clone()
    model.merge_adapter()
    model = change(model)
    model.unmerge_adapter()
    after = model.base_model.model.first.weight
    assert torch.equal(after, before.to(after.dtype))


def test_an_optimizers_parameter_is_there_again(model):
    weight = model.base_model.model.first.base_layer.weight
    weight.note = "of another program"
    model.merge_adapter()
    assert model.base_model.model.first.base_layer.weight.note == weight.note
    model.unmerge_adapter()
    assert model.base_model.model.first.base_layer.weight is weight


def test_unloading_leaves_nothing_behind(model):
    model.base_model.set_adapter(["one", "two"])
    with torch.no_grad():
        y = model(X)
        base = model.merge_and_unload()
        torch.testing.assert_close(base(X), y)
    assert not any(isinstance(module, BOFTLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")
