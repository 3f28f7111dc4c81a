"""Ways to run a model: checkpointing, several forwards, layers alone, cached inference, DDP."""

import copy
import pickle
import weakref

import pytest
import torch
from conftest import START_METHOD
from dense import net, randomize
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from boft import BOFTConfig, BOFTLayer, set_strength
from boft.solver import RotationSolver

TARGETS = ["first", "second", "conv"]


def config(b=4, m=1, targets=TARGETS, **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets), **kwargs)


def adapted(**kwargs):
    return randomize(get_peft_model(net(), config(**kwargs)))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [3, 6])  # 3: gradients of R without those of the blocks
@pytest.mark.parametrize("strength", [1, 0.5])
def test_layers_compute_the_same_without_the_models_hook(rows, strength):
    model, x = adapted(), X[:rows]
    set_strength(model, strength)
    y, true = model(x), gradients(model, model(x).square().sum())
    RotationSolver.detach(model.base_model.model)
    torch.testing.assert_close(model(x), y)
    assert_same(gradients(model, model(x).square().sum()), true)


@pytest.mark.parametrize("scale", [1.5, 1e-3, 0.0])
def test_gradients_of_scales_of_any_size(scale):
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "boft_s" in name:
                parameter.clamp_(min=0.5)
                parameter[parameter > 1] = scale
    computed = gradients(model, model(X).square().sum())
    for layer in model.modules():
        if isinstance(layer, BOFTLayer):
            assert layer.solved.divides == (scale > 1)
    RotationSolver.detach(model.base_model.model)  # layers alone do not ask
    assert_same(computed, gradients(model, model(X).square().sum()))


def test_checkpointing_keeps_no_output():
    model = adapted()
    layer = model.base_model.model.first
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.clamp_(min=0.5 if "boft_s" in name else None, max=1e9)
    model(X)
    assert layer.solved.divides  # so that the output would serve for the gradient of s
    alive = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: alive.append(tensor.shape), lambda _: None)
    outputs = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with hooks:
        model(X)
    handle.remove()
    (y,) = outputs
    storage = weakref.ref(y.untyped_storage())
    assert y.shape in alive  # went through the hooks
    grad_fn = y.grad_fn
    y = outputs.clear()
    assert storage() is None and grad_fn is not None


def shapes(tensors):
    return [tuple(tensor.shape) for tensor in tensors]


def test_one_solution_for_all_layers(monkeypatch):
    import boft.layer
    import boft.solver

    model, solved = adapted(), []
    monkeypatch.setattr(boft.layer, "super_blocks", lambda R: pytest.fail("a layer solved for itself"))
    original = boft.solver.all_super_blocks
    monkeypatch.setattr(boft.solver, "all_super_blocks", lambda Rs: solved.append(shapes(Rs)) or original(Rs))
    model(X).sum().backward()
    assert solved == [[(1, 8, 4, 4), (1, 12, 4, 4), (1, 9, 4, 4)]]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rows", [3, 6])  # 3: gradients of R without those of the blocks
def test_gradient_checkpointing(rows, use_reentrant, dropout):
    model = adapted(boft_dropout=dropout).train()
    base, x = model.base_model.model, X[:rows].clone().requires_grad_()

    def loss():
        torch.manual_seed(1)
        return model(x).square().sum()

    true = gradients(model, loss())
    for name in ("first", "second"):  # both layers of the hidden path, each a segment of its own
        layer = getattr(base, name)
        plain = layer.forward
        layer.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=use_reentrant)
    assert_same(gradients(model, loss()), true)


def test_two_forwards_before_one_backward():
    model = adapted()
    both = gradients(model, model(X).square().sum() + model(2 * X).square().sum())
    first, second = (gradients(model, model(k * X).square().sum()) for k in (1, 2))
    assert_same(both, {name: first[name] + second[name] for name in first})


def test_a_layer_alone_after_a_step_sees_the_new_parameters():
    model = adapted()
    layer = model.base_model.model.first
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    before = layer(X)
    optimizer.step()
    after = layer(X)
    assert not torch.allclose(before, after)
    after.sum().backward()  # through a graph of its own
    RotationSolver.detach(model.base_model.model)
    torch.testing.assert_close(layer(X), after)


def test_unload_takes_the_hook_off_and_a_foreign_unload_leaves_it_harmless():
    model = adapted()
    base = model.unload()
    assert not base._forward_pre_hooks and not base._forward_hooks
    base = net()
    expected = base(X)
    inject_adapter_in_model(config(), base)
    randomize(base)
    base(X)
    base.first, base.second, base.conv = (layer.base_layer for layer in (base.first, base.second, base.conv))
    assert torch.equal(base(X), expected)


def test_inference_mode_and_back_to_training():
    model = adapted()
    true = gradients(model, model(X).square().sum())
    with torch.inference_mode():
        y = model(X)
    torch.testing.assert_close(y, model(X))
    assert_same(gradients(model, model(X).square().sum()), true)
    model.requires_grad_(False)
    with torch.inference_mode():
        model(X)
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x)  # the cached weight is no inference tensor
    assert dx.abs().sum() > 0


def test_copies_and_pickles():
    model = adapted()
    model(X).sum().backward()
    with torch.no_grad():
        y = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(X), y)
        with torch.no_grad():
            torch.testing.assert_close(twin(X), y)
    merged = adapted()
    merged.merge_adapter()
    twin = copy.deepcopy(merged)
    twin.unmerge_adapter()
    torch.testing.assert_close(twin(X), y)


# Cached inference


@pytest.fixture
def cached():
    """A model in inference, with its cached weights filled, and its first layer."""
    model = adapted()
    model.add_adapter("other", config(8, 1, ["first"]))
    randomize(model, seed=4)
    with torch.no_grad():
        model(X)
    return model, model.base_model.model.first


def fresh_output(model):
    """What a copy without any memory computes."""
    with torch.no_grad():
        return copy.deepcopy(model)(X)


def test_the_kept_weight_is_all_that_a_verified_call_uses(cached, monkeypatch):
    model, layer = cached
    monkeypatch.setattr(type(layer), "adapted", lambda *args: pytest.fail("the layer looked for more"))
    with torch.no_grad():
        y = model(X)
    monkeypatch.undo()
    assert torch.equal(y, fresh_output(model))


def test_gradients_within_a_forward_pass_without_gradients(cached):
    model, _ = cached

    class Within(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            with torch.enable_grad():
                return self.inner(x)

    base = model.base_model.model
    base.first = Within(base.first)
    with torch.no_grad():
        model(X)
    seen = []
    base.first.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(X)
    assert seen[0].grad_fn is not None


def test_the_rotated_weight_is_kept_while_nothing_changes(cached):
    model, layer = cached
    kept = layer.rotated_weight.weight
    with torch.no_grad():
        model(X)
        layer(X)
    assert kept is not None and layer.rotated_weight.weight is kept
    model(X)  # trains
    assert layer.rotated_weight.weight is None
    layer.keep_rotated_weight = False
    with torch.no_grad():
        torch.testing.assert_close(model(X), fresh_output(model))
    assert layer.rotated_weight.weight is None


def load(model, layer):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def through_data(model, layer):  # as averages of weights are copied in
    layer.boft_R["default"].data.mul_(0.5)


def in_place(model, layer):
    layer.boft_s["default"].mul_(1.5)


def other_tensor(model, layer):
    layer.boft_R["default"].data = torch.zeros_like(layer.boft_R["default"])


def base_in_place(model, layer):
    layer.base_layer.weight.mul_(2)


def base_replaced(model, layer):
    layer.base_layer.weight = nn.Parameter(torch.randn(48, 32), requires_grad=False)


def strength(model, layer):
    set_strength(model, 0.3)


def factor_strength(model, layer):
    set_strength(model, [0.3])


def switch(model, layer):
    model.set_adapter("other")


def both(model, layer):
    model.base_model.set_adapter(["default", "other"])


def merge_and_unmerge(model, layer):
    model.merge_adapter()
    model.unmerge_adapter()


def dtype(model, layer):
    model.double()
    model.float()
    layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16().float()


CHANGES = [load, through_data, in_place, other_tensor, base_in_place, base_replaced, strength, factor_strength]
CHANGES += [switch, both, merge_and_unmerge, dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_the_rotated_weight_is_made_again_after_any_change(cached, change):
    model, layer = cached
    with torch.no_grad():
        change(model, layer)
        torch.testing.assert_close(model(X), fresh_output(model))
        torch.testing.assert_close(layer(X), copy.deepcopy(layer)(X))


# DDP


def train(model, losses):
    """Gradients of two steps and what they made of the weights; losses(model, step) are added up."""
    found, optimizer = {}, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for loss in losses(model, step):
            loss.backward()
        optimizer.step()
        for name, p in model.named_parameters():
            if p.requires_grad:
                found[f"{step} {name.removeprefix('module.')}"] = torch.stack([p.grad, p.detach()])
    return found


def half_loss(model, rank, step):
    """Of this rank's half of X, with dropout of its own."""
    torch.manual_seed(10 * step + rank)
    return model(X[3 * rank : 3 * rank + 3]).square().mean()


def train_a_half(rank, folder):
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for dropout in (0.0, 0.4):
        parallel = nn.parallel.DistributedDataParallel(adapted(b=2, m=2, boft_dropout=dropout).train())
        found = train(parallel, lambda model, step: [half_loss(model, rank, step)])
        torch.save(found, f"{folder}/{dropout}-{rank}.pt")
        del parallel  # before its group, which it would else destroy with the GIL held, and gloo may need that
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_what_one_does(tmp_path):
    """To the bit alike on both ranks; as one process on the whole batch, or with dropout half after half."""
    torch.multiprocessing.start_processes(train_a_half, (str(tmp_path),), nprocs=2, start_method=START_METHOD)
    for dropout in (0.0, 0.4):
        left, right = (torch.load(tmp_path / f"{dropout}-{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(left[name], right[name]) for name in left)
        alone = adapted(b=2, m=2, boft_dropout=dropout).train()
        assert_same(left, train(alone, lambda model, step: [half_loss(model, rank, step) / 2 for rank in (0, 1)]))
        if not dropout:
            whole = train(adapted(b=2, m=2).train(), lambda model, step: [model(X).square().mean()])
            assert_same(left, whole)


def test_a_layer_used_twice_gets_both_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    model = randomize(get_peft_model(Twice(), config(4, 2, ["layer"])))
    true = gradients(model, model(X).square().sum())
    RotationSolver.detach(model.base_model.model)
    assert_same(gradients(model, model(X).square().sum()), true)
    assert any(isinstance(module, BOFTLayer) for module in model.modules())
