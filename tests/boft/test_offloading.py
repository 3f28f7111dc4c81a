"""Models whose parameters accelerate takes away between the calls of modules, as diffusers does for pipelines."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from dense import net, randomize
from peft import get_peft_model

from boft import BOFTConfig, set_strength

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
CONFIG = {"boft_block_size": 4, "boft_n_butterfly_factor": 1, "target_modules": ["first", "second", "conv"]}


def adapted():
    return randomize(get_peft_model(net(), BOFTConfig(**CONFIG)).eval().requires_grad_(False), std=0.1)


def offload(model):
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    return model


def assert_equal(y, expected):
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_offloaded_adapters_are_applied():
    expected, model = adapted(), offload(adapted())
    for strength in (1.0, 0.5, 0.0):
        set_strength(expected, strength)
        set_strength(model, strength)
        for _ in range(2):
            assert_equal(model(X), expected(X))
    assert all(p.is_meta for p in model.parameters())


@torch.no_grad()
def test_offloaded_adapters_of_a_batch():
    expected, model = adapted(), offload(adapted())
    names = ["default", "__base__"] * 3
    assert_equal(model(X, adapter_names=names), expected(X, adapter_names=names))


@torch.no_grad()
def test_offloaded_layers_are_merged_and_unmerged():
    expected, model = adapted(), offload(adapted())
    model.merge_adapter()
    assert_equal(model(X), expected(X))
    model.unmerge_adapter()
    assert_equal(model(X), expected(X))
    model.merge_adapter()
    with model.disable_adapter(), expected.disable_adapter():  # unmerges in the call
        assert torch.equal(model(X), expected(X))
    assert_equal(model.merge_and_unload()(X), expected(X))


@torch.no_grad()
def test_an_adapter_is_added_to_an_offloaded_model():
    expected, model = adapted(), get_peft_model(offload(net()), BOFTConfig(**CONFIG)).eval()
    base = net().eval()(X)
    assert not any(p.is_meta for name, p in model.named_parameters() if "boft_" in name)
    assert torch.equal(model(X), base)
    randomize(model, std=0.1)
    assert_equal(model(X), expected(X))


def test_no_adapter_is_added_to_offloaded_adapters():
    model = offload(adapted())
    with pytest.raises(TypeError, match=r"first.*: the adapters of the layer are offloaded by accelerate"):
        model.add_adapter("two", BOFTConfig(**CONFIG))
    assert list(model.peft_config) == ["default"]
    remove_hook_from_module(model, recurse=True)
    model.add_adapter("two", BOFTConfig(**CONFIG))


def test_a_model_on_the_meta_device():
    model = adapted().to("meta")
    assert model(X.to("meta")).shape == adapted()(X).shape
