"""Quantized linear layers, rotated on the side of the activations."""

import pytest
import torch
from dense import dense_rotation, randomize
from peft import get_peft_model
from torch import nn

from boft import BOFTConfig

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional: pip install bitsandbytes")


def quantized(bits):
    torch.manual_seed(0)
    source = nn.Linear(64, 96)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    layer.load_state_dict(source.state_dict())
    return nn.Sequential(layer.to("cpu")).requires_grad_(False)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_linear(bits):
    base = quantized(bits)
    x = torch.randn(40, 64, requires_grad=True)
    model = get_peft_model(base, BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    fresh, bias = layer.base_layer(x), layer.bias
    torch.testing.assert_close(model(x), fresh)

    randomize(model, std=0.1)
    B, s = dense_rotation(layer.boft_R["default"].double()).float(), layer.boft_s["default"].flatten()
    expected = s * (layer.base_layer(x @ B) - bias) + bias
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=2e-3 if bits == 4 else 2e-2)
    model(x).square().sum().backward()
    assert layer.boft_R["default"].grad.abs().sum() > 0 and x.grad.abs().sum() > 0

    with torch.no_grad():
        y, bytes_before = model(x), layer.weight.data.clone()
        model.merge_adapter()
        merged = model(x)
        assert (merged - y).norm() / y.norm() < (0.2 if bits == 4 else 0.05)  # quantized again
        assert not torch.equal(layer.weight.data, bytes_before)
        model.unmerge_adapter()
        assert torch.equal(layer.weight.data, bytes_before)
        torch.testing.assert_close(model(x), y)


def test_weights_that_cannot_be_written_are_not_merged():
    model = get_peft_model(quantized(4), BOFTConfig(boft_block_size=8, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.quantization_backend.supports_merge = False
    with pytest.raises(TypeError, match="BOFT cannot merge into bnb 4bit weights; use the adapter unmerged"):
        model.merge_adapter()
