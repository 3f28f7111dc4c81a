"""Compares the adapter on this device with what it must equal; states each error beside its limit.

The reference is the adapter's definition in float64 on the CPU: dense rotations, factor by factor, and autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boft import BOFTConfig, BOFTLayer, BOFTModel, set_strength
from boft.rotation import apply_factor
from finetuning.studies.gpu_check.check import Check

TARGETS = ["first", "second", "conv"]
B = 8  # block size
ROWS = (4, 256)  # for few rows the adapter rotates activations, for many it rotates weights
LIMITS = {torch.float32: 2e-4, torch.bfloat16: 0.06, torch.float16: 0.01}  # in units of the largest value
Gradients = dict[str, Tensor]


class Net(nn.Module):
    """Two linear layers, one without bias, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 192)
        self.second = nn.Linear(192, 256, bias=False)
        self.conv = nn.Conv2d(64, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 128)
        hidden = self.second(torch.tanh(self.first(x)))  # (N, 256)
        return self.conv(hidden.view(-1, 64, 2, 2)).mean((2, 3))  # (N, 32)


def run(check: Check) -> None:
    """Measure every identity as {"error", "limit", "holds"}; those that must hold exactly have the limit 0."""
    with exact_products():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            for m in (1, 2, 4):
                for rows in ROWS:
                    about = f"dense reference, {name}, m={m}, {rows} rows"
                    check.measure(about, partial(against_dense, check.device, dtype, m, rows))
        for title, identity in IDENTITIES.items():
            check.measure(title, partial(identity, check.device))
        count(check)
        backend = "inductor" if check.on_gpu else "aot_eager"  # all of compilation but the code generator
        for m in (1, 2):
            title = f"compiled ({backend}): one graph, the same values and gradients, m={m}"
            check.measure(title, partial(compiled, check.device, m, backend), needs=20 if check.on_gpu else 0)
    count(check)


def count(check: Check) -> None:
    """Record how many identities hold; one that could not be measured counts as not held."""
    held = [row["holds"] for name, row in check.results.items() if name != "all"]
    check.put("all", {"identities": len(held) + len(check.errors), "hold": sum(held)})


@contextmanager
def exact_products() -> Iterator[None]:
    """Computes products of float32 numbers in float32, not in TF32, within the block."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def adapted(
    device: torch.device, dtype: torch.dtype = torch.float32, m: int = 2, std: float = 0.1, **options: Any
) -> Net:
    """A net with random weights and random adapters. m: number of factors; std: of the adapters' numbers."""
    torch.manual_seed(0)
    net = Net().to(device, dtype).eval()
    config = BOFTConfig(boft_block_size=B, boft_n_butterfly_factor=m, target_modules=TARGETS, **options)
    BOFTModel(net, config, "default")
    randomize(net, "default", std)
    return net


@torch.no_grad()
def randomize(net: nn.Module, adapter: str, std: float, seed: int = 1) -> None:
    """Give an adapter of all layers random numbers around those that do nothing, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(net):
        for parameter, rest in ((layer.boft_R[adapter], 0), (layer.boft_s[adapter], 1)):
            parameter.copy_(rest + std * torch.randn(parameter.shape, generator=generator))


def layers_of(net: nn.Module) -> list[BOFTLayer]:
    """All adapted layers of a net."""
    return [module for module in net.modules() if isinstance(module, BOFTLayer)]


def rows_of(count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random input of the net, (count, 128)."""
    x = torch.randn(count, 128, generator=torch.Generator().manual_seed(2))
    return x.to(device, dtype)


def outcome(error: Tensor | float, limit: float) -> dict[str, Any]:
    """An error beside its limit, and whether it is within it."""
    error = float(error.detach()) if isinstance(error, Tensor) else error
    return {"error": error, "limit": limit, "holds": error <= limit}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference between a and b, in units of the largest value of b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def gradients(net: nn.Module, loss: Tensor) -> Gradients:
    """{name of a parameter: the gradient of the loss}."""
    net.zero_grad()
    loss.backward()
    return {name: p.grad.detach().clone() for name, p in net.named_parameters() if p.grad is not None}


def farthest(a: Gradients, b: Gradients) -> float:
    """The largest `distance` between gradients of the same parameters."""
    if a.keys() != b.keys():
        raise ValueError(f"gradients of other parameters: {sorted(a.keys() ^ b.keys())}")
    return max(distance(a[name], b[name]) for name in b)


# The reference


def dense_rotation(R: Tensor) -> Tensor:
    """The rotation (d, d) of R (m, D, b, b), in float64: the product of its factors, as the paper defines them."""
    S = (R - R.mT) / 2
    I = torch.eye(R.shape[-1], dtype=R.dtype)
    Q = torch.linalg.solve(I + S, I - S, left=False)
    rows = torch.eye(R.shape[1] * R.shape[-1], dtype=R.dtype)
    for i in reversed(range(len(Q))):  # in x B, the last factor is applied first
        rows = apply_factor(rows, Q[i], i)
    return rows


def dense_forward(net: Net, parameters: dict[str, tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The net's output with dense rotations, in float64. parameters: {name of a layer: its R and s}."""

    def rotated(name: str) -> tuple[Tensor, Tensor | None]:
        base, (R, s) = getattr(net, name).get_base_layer(), parameters[name]
        W = base.weight.detach().double().cpu()
        bias = None if base.bias is None else base.bias.detach().double().cpu()
        return ((W.flatten(1) @ dense_rotation(R).T) * s.reshape(-1, 1)).view(W.shape), bias

    hidden = torch.tanh(nn.functional.linear(x, *rotated("first")))
    hidden = nn.functional.linear(hidden, *rotated("second"))
    return nn.functional.conv2d(hidden.view(-1, 64, 2, 2), *rotated("conv"), padding=1).mean((2, 3))


def against_dense(device: torch.device, dtype: torch.dtype, m: int, rows: int) -> dict[str, Any]:
    """Compare output and gradients of input, R and s with the reference; in float16, a GradScaler is used."""
    net, x = adapted(device, dtype, m), rows_of(rows, device, dtype).requires_grad_()
    parameters = {name: (leaf(getattr(net, name).boft_R), leaf(getattr(net, name).boft_s)) for name in TARGETS}
    x_true = x.detach().double().cpu().requires_grad_()
    y_true = dense_forward(net, parameters, x_true)
    leaves = [x_true, *(tensor for pair in parameters.values() for tensor in pair)]
    true = torch.autograd.grad(y_true.square().mean(), leaves)

    y = net(x)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    net.zero_grad()
    scaler.scale(y.float().square().mean()).backward()
    factor = scaler.get_scale()
    assert x.grad is not None
    found = [x.grad]
    for name in TARGETS:
        layer = getattr(net, name)
        found += [layer.boft_R["default"].grad, layer.boft_s["default"].grad]
    errors = [distance(y, y_true), *(distance(a.double().cpu() / factor, b) for a, b in zip(found, true))]
    limit = LIMITS[dtype]
    return outcome(max(errors), limit if dtype == torch.float32 else 2 * limit) | {"output_error": errors[0]}


def leaf(values: Mapping[str, Tensor]) -> Tensor:
    """A copy of the numbers of the adapter "default" in float64 on the CPU, which gets gradients."""
    return values["default"].detach().double().cpu().requires_grad_()


# Identities of a model with itself


def merged(device: torch.device) -> dict[str, Any]:
    """Merged weights give the output of unmerged ones, and unmerging restores the weights to the bit."""
    net, x = adapted(device), rows_of(256, device)
    layers = [cast(Any, layer) for layer in layers_of(net)]
    weights = [layer.get_base_layer().weight.clone() for layer in layers]
    with torch.no_grad():
        unmerged = net(x)
        for layer in layers:
            layer.merge()
        error = distance(net(x), unmerged)
        for layer in layers:
            layer.unmerge()
    same = all(torch.equal(layer.get_base_layer().weight, weight) for layer, weight in zip(layers, weights))
    return outcome(error, LIMITS[torch.float32]) | {"unmerged_to_the_bit": same}


def inference(device: torch.device) -> dict[str, Any]:
    """Without gradients, the rotated weight is kept from call to call, and the output stays that of training."""
    net, x = adapted(device), rows_of(256, device)
    trained = net(x)
    with torch.no_grad():
        errors = [distance(net(x), trained) for _ in range(3)]
    return outcome(max(errors), LIMITS[torch.float32])


def strengths(device: torch.device) -> dict[str, Any]:
    """An adapter at strength 1/2 equals one whose parameters are halved."""
    net, x = adapted(device), rows_of(256, device)
    set_strength(net, 0.5)
    halved = net(x)
    set_strength(net, 1.0)
    with torch.no_grad():
        for layer in layers_of(net):
            R, s = layer.boft_R["default"], layer.boft_s["default"]
            R.mul_(0.5)
            s.copy_(1 + 0.5 * (s - 1))
    return outcome(distance(halved, net(x)), LIMITS[torch.float32])


def strength_of_nothing(device: torch.device) -> dict[str, Any]:
    """An adapter at strength 0 gives the base's output to the bit."""
    net, x = adapted(device), rows_of(256, device)
    torch.manual_seed(0)
    base = Net().to(device).eval()
    set_strength(net, 0.0)
    return outcome((net(x) - base(x)).abs().max(), 0.0)


def two_adapters(device: torch.device) -> dict[str, Any]:
    """Two active adapters equal the product of their rotations."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(128, 64)).to(device)
    W, bias = (tensor.detach().double().cpu() for tensor in layer.parameters())
    config = BOFTConfig(boft_block_size=B, boft_n_butterfly_factor=2, target_modules=["0"])
    tuner = BOFTModel(layer, config, "one")
    tuner.peft_config["two"] = config
    tuner.inject_adapter(layer, "two")
    randomize(layer, "one", 0.1, seed=1)
    randomize(layer, "two", 0.1, seed=2)
    adapter: Any = layer[0]  # which has become a BOFTLayer
    adapter.set_adapter(["one", "two"])
    x = rows_of(32, device)
    B_, s = torch.eye(128, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    for name in ("two", "one"):
        B_ = B_ @ dense_rotation(adapter.boft_R[name].detach().double().cpu())
        s = s * adapter.boft_s[name].detach().double().cpu().flatten()
    expected = (x.double().cpu() @ B_ @ W.T) * s + bias
    return outcome(distance(layer(x), expected), LIMITS[torch.float32])


def dropout(device: torch.device) -> dict[str, Any]:
    """With dropped blocks the rest is still a rotation; the share of kept blocks is right; evaluation drops none."""
    net = adapted(device, boft_dropout=0.5).train()
    x = rows_of(16, device)
    whole = net.eval()(x)
    net.train()
    blocks = cast(Any, net.second).super_blocks("default").detach()
    identity = torch.eye(blocks.shape[-1], device=device)
    error = distance(blocks @ blocks.mT, identity.expand_as(blocks))
    torch.manual_seed(3)
    first = net(x)
    torch.manual_seed(3)
    again, other = net(x), net(x)
    kept = torch.rand(1000, device=device).ge(0.5).float().mean()
    facts = {
        "same_seed_same_bits": torch.equal(first, again),
        "another_draw_differs": not torch.equal(first, other),
        "evaluation_drops_none": torch.equal(net.eval()(x), whole),
        "share_kept": float(kept),
    }
    return outcome(error if all(list(facts.values())[:3]) else float("inf"), LIMITS[torch.float32]) | facts


def checkpointing(use_reentrant: bool) -> Callable[[torch.device], dict[str, Any]]:
    """The identity that gradient checkpointing of either kind leaves the gradients as they are, with dropout too."""

    def identity(device: torch.device) -> dict[str, Any]:
        errors = []
        for rows in ROWS:
            net, x = adapted(device, boft_dropout=0.3).train(), rows_of(rows, device).requires_grad_()

            def loss(net: Net = net, x: Tensor = x) -> Tensor:
                torch.manual_seed(1)
                return net(x).square().mean()

            true = gradients(net, loss())
            for layer in (net.first, net.second):
                call = partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
                setattr(layer, "forward", call)  # noqa: B010, an assignment that type checkers refuse
            errors.append(farthest(gradients(net, loss()), true))
        return outcome(max(errors), LIMITS[torch.float32])

    return identity


def compiled(device: torch.device, m: int, backend: str) -> dict[str, Any]:
    """`torch.compile` leaves values and gradients as they are, in one graph: with fullgraph a break is an error."""
    net, x = adapted(device, m=m), rows_of(256, device)
    y, true = net(x), gradients(net, net(x).square().mean())
    torch.compiler.reset()
    fast = torch.compile(net, backend=backend, fullgraph=True)
    error = max(distance(fast(x), y), farthest(gradients(net, fast(x).square().mean()), true))
    torch.compiler.reset()
    return outcome(error, 5 * LIMITS[torch.float32])


IDENTITIES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "merged = unmerged, and back to the bit": merged,
    "kept rotated weight = training": inference,
    "strength 0.5 = half the parameters": strengths,
    "strength 0 = the base, to the bit": strength_of_nothing,
    "two adapters = the product of their rotations": two_adapters,
    "dropout leaves rotations": dropout,
    "checkpointing, reentrant": checkpointing(True),
    "checkpointing, not reentrant": checkpointing(False),
}
