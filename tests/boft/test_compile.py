"""`torch.compile`: one graph for a whole model, with equal values and gradients, for any strength."""

import shutil

import pytest
import torch
from dense import net, randomize
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from boft import BOFTConfig, set_strength

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor's code for a CPU wants a C++ compiler"
)


def adapted(m=1, targets=("first", "second", "conv"), dropout=0.0):
    config = BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=m, target_modules=list(targets), boft_dropout=dropout
    )
    return randomize(get_peft_model(net(), config))


def values_and_gradients(model, call):
    model.zero_grad()
    y = call(X)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("m", "targets"), [(1, ("first", "second", "conv")), (2, ("first", "second"))], ids=["m=1", "m=2"]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_one_graph_for_all_strengths(backend, m, targets):
    model = adapted(m, targets).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outputs = []
    for strength in (1.0, 0.5, 1.7, [0.5, 2.0][:m]):
        set_strength(model, strength)
        found, true = values_and_gradients(model, compiled), values_and_gradients(model, model)
        assert len(found) == len(true) > 4
        for mine, value in zip(found, true):
            torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5)
        outputs.append(found[0])
    assert all(not torch.allclose(outputs[0], other) for other in outputs[1:])
    assert counter.frame_count == 1
    for strength in (1.0, 0.3, 0.0):
        set_strength(model, strength)
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 2  # one more without gradients


def test_dropout_is_drawn_in_the_graph():
    model = adapted(dropout=0.4).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert not torch.allclose(compiled(X), compiled(X))
    model.eval()
    torch.testing.assert_close(compiled(X), model(X))
