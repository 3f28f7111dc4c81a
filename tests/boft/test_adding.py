"""Adding, switching, weighting and deleting adapters, and batches with an adapter for each element."""

import copy
import math

import pytest
import torch
from dense import net, randomize
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration

from boft import BOFTConfig, BOFTLayer, add_weighted_adapter, set_strength

TARGETS = ["first", "second", "conv"]
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def config(b=4, m=1, targets=TARGETS, **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=targets, **kwargs)


def two_adapters(**kwargs):
    model = randomize(get_peft_model(net(), config(**kwargs), adapter_name="one"))
    model.add_adapter("two", config(8, 1, ["first", "second"], **kwargs))
    return randomize(model, seed=3).eval()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# Weighted adapters


class Alike(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.block = nn.Linear(16, 16), nn.ModuleDict({"proj": nn.Linear(16, 16)})

    def forward(self, x):
        return self.block["proj"](self.proj(x))


@pytest.mark.parametrize("injected", [False, True])
def test_a_weighted_adapter_is_on_the_layers_of_its_adapters_only(injected, tmp_path):
    torch.manual_seed(0)
    base, x = Alike(), torch.randn(3, 16)
    add = inject_adapter_in_model if injected else get_peft_model
    model = (
        add(config(targets="proj"), base, adapter_name="one") if injected else add(base, config(targets="proj"), "one")
    )
    randomize(model)
    y = model(x)
    add_weighted_adapter(model, ["one"], [1.0], "mixed")
    layers = [name for name, layer in model.named_modules() if isinstance(layer, BOFTLayer)]
    assert [name.removeprefix("base_model.model.") for name in layers] == ["proj"]
    for layer in model.modules():
        if isinstance(layer, BOFTLayer):
            layer.set_adapter("mixed")
    assert torch.equal(model(x), y)
    if not injected:
        model.save_pretrained(tmp_path, selected_adapters=["mixed"])
        loaded = PeftModel.from_pretrained(Alike(), tmp_path / "mixed")
        assert [name for name, layer in loaded.named_modules() if isinstance(layer, BOFTLayer)] == layers


@pytest.mark.parametrize("injected", [False, True])
def test_an_error_leaves_no_half_made_adapter(injected, monkeypatch):
    model = two_adapters() if not injected else inject_adapter_in_model(config(), net(), "one")
    before, active = (
        trainable(model),
        [layer.active_adapters for layer in model.modules() if isinstance(layer, BOFTLayer)],
    )
    with torch.no_grad():
        y = model(X)
    calls = []

    def fails_late(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("no more memory")

    monkeypatch.setattr(BOFTLayer, "combine", fails_late)
    with pytest.raises(MemoryError):
        add_weighted_adapter(model, ["one"], [1.0], "mixed")
    layers = [layer for layer in model.modules() if isinstance(layer, BOFTLayer)]
    assert "mixed" not in model.peft_config and not any("mixed" in layer.boft_R for layer in layers)
    assert trainable(model) == before and [layer.active_adapters for layer in layers] == active
    with torch.no_grad():
        assert torch.equal(model(X), y)
    monkeypatch.undo()
    add_weighted_adapter(model, ["one"], [0.5], "mixed")


# Strengths


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, [math.nan]])
def test_strengths_that_are_not_finite_are_refused(strength):
    model = two_adapters()
    y = model(X)
    with pytest.raises(ValueError, match=r"strength .* of adapter 'one' must be a finite number"):
        set_strength(model, strength, "one")
    layer = model.base_model.model.first
    for change in (layer.scale_layer, lambda value: layer.set_scale("one", value), layer.unscale_layer):
        if not isinstance(strength, list) and not (change == layer.unscale_layer and math.isinf(strength)):
            with pytest.raises(ValueError, match="finite"):
                change(strength)
    assert torch.equal(model(X), y)


def test_a_strength_that_does_not_fit_one_layer_is_set_on_none():
    model = get_peft_model(net(), config(4, 2, ["first"]), adapter_name="one")
    layer = copy.deepcopy(model.base_model.model.first)
    layer.set_shape("one", 1, 8, 4)
    model.base_model.model.other = layer
    with pytest.raises(ValueError, match="m=1 factors"):
        set_strength(model, [0.5, 0.5], "one")
    assert model.base_model.model.first.factor_scaling["one"] is None


# Disabling and deleting


def test_disabling_leaves_frozen_what_was_frozen():
    for frozen in (True, False):
        model = get_peft_model(net(), config(inference_mode=frozen, modules_to_save=["classifier"]))
        before = trainable(model)
        assert any("boft_" in name for name in before) != frozen
        with model.disable_adapter():
            assert not any("boft_" in name for name in trainable(model))
            with model.disable_adapter():
                pass
        assert trainable(model) == before
        model.base_model.model.first.set_requires_grad("default", False)
        before = trainable(model)
        with model.disable_adapter():
            pass
        assert trainable(model) == before


def test_what_is_changed_while_disabled_stays_changed():
    model = two_adapters()
    model.set_adapter("one")
    with model.disable_adapter():
        model.set_adapter("two")
    assert {name.split(".")[-1] for name in trainable(model)} == {"two"}
    with model.disable_adapter():
        model.set_requires_grad("two", False)
    assert not trainable(model)
    model.set_adapter("one")
    before = trainable(model)
    with model.disable_adapter():
        model.add_adapter("three", config(targets=["first"]))
    assert trainable(model) == before


def test_a_rotated_weight_goes_with_its_adapter():
    model = two_adapters()
    with torch.no_grad():
        model(X)
        layer = model.base_model.model.conv
        assert layer.rotated_weight.weight is not None
        model.set_adapter("two")
        model.delete_adapter("one")
        assert layer.rotated_weight.weight is None
        y = model(X)
        assert layer.rotated_weight.weight is None and model.base_model.model.first.rotated_weight.weight is not None
        torch.testing.assert_close(copy.deepcopy(model)(X), y)


# Batches


NAMES = ["one", "two", "two", "__base__", "one"]


@pytest.mark.parametrize("hooked", [False, True])
def test_each_element_of_a_batch_has_its_adapter(hooked):
    model = two_adapters()
    if hooked:
        for name in TARGETS:
            getattr(model.base_model.model, name).base_layer.register_forward_hook(lambda module, args, y: y + 0.1)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = model(X).detach()
    with model.disable_adapter():
        alone["__base__"] = model(X).detach()
    expected = torch.stack([alone[name][row] for row, name in enumerate(NAMES)])
    set_strength(model, 0.0, "one")  # as the base model
    weaker = torch.stack([alone["__base__" if name == "one" else name][row] for row, name in enumerate(NAMES)])
    torch.testing.assert_close(model(X, adapter_names=NAMES), weaker)
    set_strength(model, 1.0, "one")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for call in (model, model.base_model):
                torch.testing.assert_close(call(X, adapter_names=NAMES), expected)
            torch.testing.assert_close(model(X), alone["two"])  # what is active stays active
    assert not any(layer._forward_pre_hooks for layer in model.modules() if isinstance(layer, BOFTLayer))


def test_batches_that_cannot_be_are_refused():
    model = two_adapters()
    for names, message in (
        (["one"] * 4, "4 names for a batch of 5"),
        (
            ["one", "two", "typo", "one", "one"],
            r"\['typo'\] are no adapters of this model; there are \['one', 'two'\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(X, adapter_names=names)
    with pytest.raises(TypeError, match="must be a list of names"):
        model(X, adapter_names="onetw")
    model.train()
    with pytest.raises(ValueError, match=r"inference only: call eval\(\)"):
        model(X, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        model(X, adapter_names=NAMES)
    model.unmerge_adapter()
    assert not any(layer._forward_pre_hooks for layer in model.modules() if isinstance(layer, BOFTLayer))


def test_beams_of_a_batch_have_the_adapter_of_their_element():
    torch.manual_seed(0)
    base = MT5ForConditionalGeneration(
        MT5Config(vocab_size=20, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0)
    )
    base.generation_config.decoder_start_token_id = 0
    settings = config(targets=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, settings, adapter_name="one")
    model.add_adapter("two", copy.deepcopy(settings))
    randomize(model, std=1.0).eval()
    ids = torch.arange(12).view(2, 6)
    how = {"max_new_tokens": 4, "num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    got = model.generate(input_ids=ids, adapter_names=["two", "__base__"], **how).sequences_scores
    model.set_adapter("two")
    first = model.generate(input_ids=ids[:1], **how).sequences_scores
    with model.disable_adapter():
        second = model.generate(input_ids=ids[1:], **how).sequences_scores
    torch.testing.assert_close(got, torch.cat([first, second]))
