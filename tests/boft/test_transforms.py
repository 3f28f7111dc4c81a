"""`torch.func`, forward-mode differentiation, tracing, export and fake tensors."""

import pytest
import torch
from dense import net, randomize
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from boft import BOFTConfig
from boft.solver import RotationSolver

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[("first", "second", "conv", 1), ("first", "second", 2)], ids=["m=1", "m=2"])
def model(request):
    *targets, m = request.param
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=m, target_modules=targets)
    return randomize(get_peft_model(net(), config)).eval()


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def trained(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_a_functional_call(model):
    model(X).square().sum().backward()
    found = grad(lambda p: functional_call(model, p, (X,)).square().sum())(parameters(model))
    assert trained(model)
    for name, gradient in trained(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_of_each_sample(model):
    def loss(p, x):
        return functional_call(model, p, (x[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters(model), X)
    model(X).square().sum().backward()
    for name, gradient in trained(model).items():
        assert each[name].shape == (6, *gradient.shape)
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_vmap_over_inputs(model, frozen):
    model.requires_grad_(not frozen)
    for _ in range(2):  # before and after a weight is kept
        torch.testing.assert_close(vmap(model)(X[:, None])[:, 0], model(X))


def test_forward_mode(model):
    direction, x = torch.ones_like(X), X.clone().requires_grad_()
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    (dx,) = torch.autograd.grad((model(x) * weights).sum(), x)
    y, tangent = jvp(model, (X,), (direction,))
    torch.testing.assert_close(y, model(X))
    torch.testing.assert_close((tangent * weights).sum(), (dx * direction).sum(), rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(X, direction)))
    torch.testing.assert_close(dual.tangent, tangent)


def export(model, x, strict):
    return torch.export.export(model, (x,), strict=strict).module()


TRACERS = {
    "jit": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "make_fx": lambda model, x: make_fx(model)(x),
    "fake make_fx": lambda model, x: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "export": lambda model, x: export(model, x, strict=False),
    "strict export": lambda model, x: export(model, x, strict=True),
}


@pytest.mark.filterwarnings("ignore")  # of tracers, about themselves
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_recorded_is_the_model(model, tracer, frozen):
    model.requires_grad_(not frozen)
    recorded = TRACERS[tracer](model, X)
    for x in (X, 2 * X):
        torch.testing.assert_close(recorded(x), model(x))


def test_fake_tensors(model):
    """have no values that could be asked for, and leave nothing behind."""
    true = model(X)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for frozen in (False, True):
            model.requires_grad_(not frozen)
            for _ in range(2):
                assert model(mode.from_tensor(X)).shape == true.shape
    torch.testing.assert_close(model(X), true)
    RotationSolver.detach(model.base_model.model)
    torch.testing.assert_close(model(X), true)
