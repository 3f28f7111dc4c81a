"""What a GPU would be waited for: nothing in a training step, nor in a call of a model in which nothing changes.

The CPU stands in for a device whose values must not be asked for.
"""

from collections import Counter

import pytest
import torch
from dense import net, randomize
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import boft.cayley
import boft.memory
import boft.solver
import boft.super_blocks
from boft import BOFTConfig, set_strength

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
WAITING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (boft.cayley, boft.memory, boft.solver, boft.super_blocks):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)


@pytest.fixture
def model():
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["first", "second", "conv"])
    return randomize(get_peft_model(net(), config))


def waited_for(call):
    with Counted() as counted:
        call()
    assert counted.calls
    return WAITING & counted.calls.keys()


def test_on_a_cpu_values_are_asked_for(model):
    assert waited_for(lambda: model(X).sum().backward()) == {"aten::_local_scalar_dense"}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_training_waits_for_nothing(model, as_on_a_gpu, dropout):
    model.train()
    for module in model.modules():
        if isinstance(module, boft.BOFTLayer):
            module.boft_dropout["default"] = dropout
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def step():
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for strength in (1.0, 0.5):
        set_strength(model, strength)
        assert waited_for(step) == set()


def test_inference_waits_for_nothing_and_sees_changes_in_place(model, as_on_a_gpu):
    def infer():
        with torch.no_grad():
            return model(X)

    infer()
    layer = model.base_model.model.first
    kept = layer.rotated_weight.weight
    assert waited_for(infer) == set()
    assert kept is not None and layer.rotated_weight.weight is kept
    before = infer()
    with torch.no_grad():
        layer.boft_R["default"].mul_(0.5)
    changed = infer()
    assert not torch.allclose(changed, before)
    layer.boft_R["default"].data = 2 * layer.boft_R["default"].data  # another tensor
    torch.testing.assert_close(infer(), before)
    layer.boft_R["default"].data.mul_(0.5)  # leaves no trace:
    layer.rotated_weight.forget()
    torch.testing.assert_close(infer(), changed)
