"""Threads that share a model: each forward pass is that of one setting."""

import sys
import threading

import pytest
import torch
from dense import net, randomize
from peft import get_peft_model

from boft import BOFTConfig, set_strength

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["first", "second", "conv"])
    return randomize(get_peft_model(net(), config)).eval()


@pytest.fixture(autouse=True)
def often():
    """Threads take turns after a few operations."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def beside(work, infer, count=3):
    """Runs `infer` in threads until `work` is done; returns what they found wrong."""
    wrong, is_over = [], threading.Event()

    def repeat():
        while not is_over.is_set():
            try:
                fault = infer()
            except Exception as error:
                fault = repr(error)
            if fault:
                wrong.append(fault)

    threads = [threading.Thread(target=repeat) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    return wrong


@pytest.mark.parametrize("frozen", [False, True])
def test_threads_infer_while_strengths_change(model, frozen):
    model.requires_grad_(not frozen)
    strengths, values = (0.0, 0.5, 1.0), []
    with torch.no_grad():
        for strength in strengths:
            set_strength(model, strength)
            values.append(model(X))

    def infer():
        with torch.set_grad_enabled(frozen):
            y = model(X)
        distance = min((y - value).abs().max().item() for value in values)
        return distance if distance > 1e-5 else None

    def work():
        for i in range(150):
            set_strength(model, strengths[i % 3])
            model.base_model.model(X)

    assert beside(work, infer) == []


def test_threads_infer_beside_one_that_trains(model):
    with torch.no_grad():
        true = model(X)
    model(X).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def infer():
        with torch.no_grad():
            y = model(X)
        return None if torch.allclose(y, true, atol=1e-5) else (y - true).abs().max().item()

    def work():
        for _ in range(60):
            model.zero_grad()
            model(X).square().sum().backward()
            for name, p in model.named_parameters():
                assert name not in gradients or torch.allclose(p.grad, gradients[name], rtol=1e-4, atol=1e-5)

    assert beside(work, infer) == []
