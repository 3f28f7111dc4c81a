"""Layers that are not what they look like: hooks, own forwards, computed weights, no weights, mixed dtypes."""

import copy
import functools
import threading
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from dense import dense_rotation, randomize
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils import parametrizations, prune

from boft import BOFTConfig, BOFTLayer, set_strength


def on(base, b=2, m=1, targets=("layer",), **kwargs):
    config = BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets))
    return get_peft_model(nn.Sequential(OrderedDict(layer=base)), config, **kwargs)


def effective(layer):
    """diag(s) W Bᵀ in float64."""
    W = layer.get_base_layer().weight.detach().double()
    R, s = (p["default"].detach().double() for p in (layer.boft_R, layer.boft_s))
    return (s.view(-1, 1) * (W.flatten(1) @ dense_rotation(R).T)).view(W.shape)


class Standardized(nn.Conv2d):
    def forward(self, x):
        W = self.weight
        W = (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, W, self.bias)


class StandardizedWithin(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class PadsByItself(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Normalized(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Gated(nn.Linear):
    def forward(self, x, gate=1.0):
        return gate * F.linear(x, self.weight, self.bias).tanh()


def doubled(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y + 1)
    return layer


def negated(layer):
    layer.register_forward_pre_hook(lambda module, args: (-args[0],))
    return layer


def own(layer):
    layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
    return layer


class Halves(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return tuple(x / 2 for x in args), kwargs


CONV, LINEAR = functools.partial(nn.Conv2d, 4, 6, 3), functools.partial(nn.Linear, 8, 6)
UNUSUAL = {
    "standardized convolution": lambda: Standardized(4, 6, 3),
    "standardized within": lambda: StandardizedWithin(4, 6, 3),
    "pads by itself": lambda: PadsByItself(4, 6, 3, stride=2),
    "convolution, hook": lambda: doubled(CONV()),
    "convolution, pre-hook": lambda: negated(CONV()),
    "convolution, own forward": lambda: own(CONV()),
    "convolution, own forward and hook": lambda: doubled(own(Standardized(4, 6, 3))),
    "convolution, accelerate": lambda: add_hook_to_module(CONV(), Halves()),
    "normalized linear": lambda: Normalized(8, 6),
    "gated linear": lambda: Gated(8, 6),
    "linear, hook": lambda: doubled(LINEAR()),
    "linear, pre-hook": lambda: negated(LINEAR()),
    "linear, own forward": lambda: own(LINEAR()),
    "linear, accelerate": lambda: add_hook_to_module(LINEAR(), Halves()),
    "linear, accelerate and own forward": lambda: add_hook_to_module(Gated(8, 6), Halves()),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_hooks_and_forwards_of_their_own_run_with_the_effective_weight(kind):
    torch.manual_seed(0)
    base = UNUSUAL[kind]().double()
    x = (torch.randn(2, 4, 7, 7) if isinstance(base, nn.Conv2d) else torch.randn(5, 8)).double()
    plain = base(x)
    model = on(base).eval()
    assert torch.equal(model(x), plain)
    randomize(model)
    layer = model.base_model.model.layer
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), [layer.boft_R["default"], layer.boft_s["default"]])
    assert not torch.allclose(y, plain)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
        model.merge_adapter()
        torch.testing.assert_close(base.weight, effective_before(layer))
        torch.testing.assert_close(model(x), y)
        model.unmerge_adapter()
        assert torch.equal(base(x), plain)
    step = 1e-5  # the gradient of s by differences
    values = []
    for change in (step, -2 * step):
        with torch.no_grad():
            layer.boft_s["default"].view(-1)[2] += change
            values.append(model(x).square().sum().item())
    expected = gradients[1].view(-1)[2].item()
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert gradients[0].isfinite().all() and (gradients[0].abs().sum() > 0)


def effective_before(layer):
    """The effective weight of a merged layer, from a copy that is unmerged."""
    twin = copy.deepcopy(layer)
    twin.unmerge()
    return effective(twin)


def test_a_hook_sees_the_adapted_output_once():
    seen = []
    conv = CONV()
    conv.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    model = randomize(on(conv))
    y = model(x := torch.randn(2, 4, 7, 7))
    assert len(seen) == 1 and torch.equal(seen[0], y)
    assert "forward" not in conv.__dict__ and type(conv._parameters) is dict
    layer = model.base_model.model.layer
    torch.testing.assert_close(y.double(), conv._conv_forward(x.double(), effective(layer), conv.bias.double()),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_threads_share_a_layer_with_a_forward_of_its_own():
    model = randomize(on(Standardized(4, 6, 3)).eval())
    x = torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        expected, wrong, done = model(x), [], []

    def infer():
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.allclose(model(x), expected, atol=1e-5))
            done.append(True)

    threads = [threading.Thread(target=infer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) == 4


def test_a_forward_that_does_not_use_the_weight_is_refused():
    class Elsewhere(nn.Linear):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="Elsewhere has a forward of its own that does not use its weight"):
        on(Elsewhere(8, 8))(torch.randn(2, 8))


# Weights that are computed


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm by hooks": old_weight_norm,
}


@pytest.mark.parametrize("build", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_adapted_and_not_merged(kind, build):
    torch.manual_seed(0)
    base = COMPUTED[kind](build()).eval()
    x = torch.randn(2, 4, 7, 7) if build is CONV else torch.randn(5, 8)
    fresh = base(x)
    model = on(base).eval()
    torch.testing.assert_close(model(x), fresh)
    randomize(model)
    layer = model.base_model.model.layer
    with torch.no_grad():
        for source in base.parameters():
            source.mul_(1.5)  # as another checkpoint does: the weight is to be computed from it
        y = model(x)
        base(x)  # computes it
        product = F.conv2d if build is CONV else F.linear
        torch.testing.assert_close(y, product(x, effective(layer).float(), base.bias), rtol=1e-4, atol=1e-4)
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(TypeError, match="computed from other parameters"):
            merge()
    assert not layer.merged and model.base_model.model.layer is layer
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


def test_a_forward_of_its_own_on_a_parametrized_weight_is_refused():
    with pytest.raises(
        TypeError, match=r"layer: .*forward of its own and computes its weight.*remove_parametrizations"
    ):
        on(parametrizations.weight_norm(Standardized(4, 6, 3)))


# Weights that others read, or that are not there


def test_transformer_encoder_calls_its_adapted_layers():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
    base = nn.TransformerEncoder(block, 2).eval()
    x, padding = torch.randn(2, 3, 16), torch.tensor([[False, False, False], [False, False, True]])
    plain = base(x)
    model = randomize(get_peft_model(base, BOFTConfig(boft_block_size=4, target_modules=["linear1", "linear2"])))
    y = model(x).detach()
    assert not torch.allclose(y, plain, atol=0.01)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), y)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)
        for _ in range(2):
            masked = model(x, src_key_padding_mask=padding)
            expected = merged(x, src_key_padding_mask=padding)
            torch.testing.assert_close(masked[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_projection_that_an_attention_multiplies_with_itself_is_refused():
    base = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32))
    config = BOFTConfig(boft_block_size=4, target_modules=["linear1", "out_proj"])
    with pytest.raises(TypeError, match=r"0.self_attn.out_proj: torch.nn.MultiheadAttention multiplies.*leave it out"):
        get_peft_model(base, config)
    assert type(base[0].linear1) is nn.Linear


@pytest.mark.parametrize(
    "layer", [nn.LazyLinear(8), nn.LazyConv2d(8, 3), nn.Linear(0, 4), nn.Linear(4, 0)], ids=lambda x: type(x).__name__
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_features_are_refused(layer):
    with pytest.raises(TypeError, match=r"layer: .*(has no weight yet; run the model once|no features)"):
        on(layer)


def test_lazy_layer_that_has_run_is_adapted():
    base = nn.Sequential(nn.LazyLinear(8))
    expected = base(x := torch.randn(3, 4))
    assert torch.equal(get_peft_model(base, BOFTConfig(boft_block_size=2, target_modules=["0"]))(x), expected)


def test_convolution_with_an_adapter_of_another_method_is_refused():
    base = nn.Sequential(CONV())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), base, "lora")
    with pytest.raises(TypeError, match=r"0: the convolution has an adapter of another method .*lora"):
        inject_adapter_in_model(BOFTConfig(boft_block_size=2, target_modules=["0"]), base, "boft")


# Base weights that train


@pytest.mark.parametrize("build", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("hooked", [False, True])
def test_base_weights_train_under_a_frozen_adapter(build, hooked):
    torch.manual_seed(0)
    base = build()
    model = randomize(on(doubled(base) if hooked else base)).requires_grad_(False)
    layer = model.base_model.model.layer
    base.requires_grad_(True)
    x = torch.randn(2, 4, 7, 7) if build is CONV else torch.randn(5, 8)
    with torch.no_grad():
        model(x)
    got = torch.autograd.grad(model(x).square().sum(), [base.weight, base.bias])
    W = base.weight.detach().double().requires_grad_()
    B, s = dense_rotation(layer.boft_R["default"].double()), layer.boft_s["default"].double().view(-1, 1)
    bias = base.bias.detach().double().requires_grad_()
    y = (F.conv2d if build is CONV else F.linear)(x.double(), (s * (W.flatten(1) @ B.T)).view(W.shape), bias)
    y = 2 * y + 1 if hooked else y
    for computed, true in zip(got, torch.autograd.grad(y.square().sum(), [W, bias])):
        torch.testing.assert_close(computed.double(), true, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("build", [LINEAR, CONV], ids=["linear", "convolution"])
def test_base_weights_train_under_an_adapter_of_no_strength(build):
    base, x = build(), torch.randn(2, 4, 7, 7) if build is CONV else torch.randn(5, 8)
    (expected,) = torch.autograd.grad(base(x).square().sum(), base.weight)
    model = randomize(on(base))
    base.requires_grad_(True)
    set_strength(model, 0)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), base.weight)
    assert torch.equal(gradient, expected)


# Dtypes


@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize("build", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize(("base", "given"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")])
def test_a_layer_multiplies_in_the_dtype_of_its_input(build, base, given, size):
    torch.manual_seed(0)
    base, given = getattr(torch, base), getattr(torch, given)
    layer = (nn.Conv2d(4, 32, 3) if build is CONV else nn.Linear(8, 6)).to(base)
    model = randomize(on(layer).eval(), std=0.1)
    adapted = model.base_model.model.layer
    x = (torch.randn(1, 4, size, size) if build is CONV else torch.randn(2 * size, 8)).to(given)
    product = F.conv2d if build is CONV else F.linear
    expected = product(x.double(), effective(adapted), layer.bias.double())
    tolerance = {"rtol": 0.05, "atol": 0.05} if given == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    y = model(x)
    torch.testing.assert_close(y.double(), expected, **tolerance)
    y.sum().backward()
    assert adapted.boft_R["default"].grad.abs().sum() > 0
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x).double(), expected, **tolerance)
        model(x.to(base))  # keeps a rotated weight
        torch.testing.assert_close(model(x).double(), expected, **tolerance)
        with model.disable_adapter():
            plain = product(x.double(), layer.weight.double(), layer.bias.double())
            torch.testing.assert_close(model(x).double(), plain, **tolerance)
        model.merge_adapter()
        assert model(x).dtype == given
        torch.testing.assert_close(model(x).double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtype_is_the_bases_where_that_is_asked_for(autocast, tmp_path):
    model = randomize(on(LINEAR().bfloat16(), autocast_adapter_dtype=autocast))
    wanted = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
    model(x := torch.randn(4, 8).bfloat16()).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.add_adapter(
        "other", BOFTConfig(boft_block_size=2, target_modules=["layer"]), autocast_adapter_dtype=autocast
    )
    layer = model.base_model.model.layer
    assert layer.boft_R["other"].dtype == wanted
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    for low in (False, True):
        model.load_adapter(tmp_path, f"low {low}", autocast_adapter_dtype=autocast, low_cpu_mem_usage=low)
        assert layer.boft_s[f"low {low}"].dtype == wanted
    model.set_adapter("low True")
    with torch.no_grad():
        y = model(x)
        model.set_adapter("default")
        torch.testing.assert_close(model(x), y)


def test_layerwise_casting_of_diffusers():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    base = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(2), nn.Linear(36, 6))
    config = BOFTConfig(boft_block_size=2, target_modules=["0", "2"])
    model = randomize(inject_adapter_in_model(config, copy.deepcopy(base))).eval()
    rounded = randomize(inject_adapter_in_model(config, copy.deepcopy(base).half().float())).eval()
    expected = rounded(x)
    apply_layerwise_casting(model, torch.float16, torch.float32)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = model(x)
            torch.testing.assert_close(y, expected)
    y.sum().backward()
    layers = [layer for layer in model.modules() if isinstance(layer, BOFTLayer)]
    assert all(layer.base_layer.weight.dtype == torch.float16 for layer in layers)
    assert all(layer.boft_R["default"].grad.abs().sum() > 0 for layer in layers)


def test_disabled_input_casting_changes_nothing_where_nothing_is_cast():
    model, x = randomize(on(LINEAR())), torch.randn(3, 8)
    y = model(x)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x), y)
    assert model.base_model.model.layer.cast_input_dtype_enabled
