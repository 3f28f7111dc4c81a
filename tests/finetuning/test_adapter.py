"""Adapters on the small UNet: start, switch, save, load, groups."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from training import assert_same

from finetuning.adapters.adapter import add_boft, add_lora, disabled, target_modules, train_fully
from finetuning.errors import InputError
from finetuning.models.unet_layers import UNET_PRESETS


@pytest.fixture
def unet(toy_base):
    return UNet2DConditionModel.from_pretrained(toy_base, subfolder="unet").eval().requires_grad_(False)


def predict(unet) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 8, 8, 8, generator=random), torch.randn(2, 24, 16, generator=random)
    return unet(x, torch.tensor([3, 500]), text).sample


def perturb(adapter) -> None:
    random = torch.Generator().manual_seed(1)
    for _, parameter in adapter.named_trainables():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)


MAKERS = {
    "boft": lambda unet: add_boft(unet, ["attention"], block_size=4, factors=2),
    "boft everywhere": lambda unet: add_boft(unet, ["all"], block_size=4),
    "lora": lambda unet: add_lora(unet, ["attention"], rank=2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_fresh_adapter_changes_nothing_and_a_disabled_one_neither(make, unet):
    with torch.no_grad():
        base = predict(unet)
        adapter = make(unet)
        assert adapter.module is unet
        torch.testing.assert_close(predict(unet), base, rtol=1e-5, atol=1e-6)
        perturb(adapter)
        changed = predict(unet)
        assert (changed - base).abs().mean() > 1e-3
        trainable = [name for name, _ in adapter.named_trainables()]
        with disabled([adapter]):
            assert torch.equal(predict(unet), base)
        assert torch.equal(predict(unet), changed)
        assert [name for name, _ in adapter.named_trainables()] == trainable


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_saved_loads_by_peft_itself(make, unet, toy_base, tmp_path):
    adapter = make(unet)
    perturb(adapter)
    adapter.save(tmp_path / "unet")
    other = UNet2DConditionModel.from_pretrained(toy_base, subfolder="unet").eval()
    loaded = PeftModel.from_pretrained(other, tmp_path / "unet")
    with torch.no_grad():
        torch.testing.assert_close(predict(loaded.get_base_model()), predict(unet), rtol=1e-5, atol=1e-6)


def test_loading_restores_every_bit(unet, tmp_path):
    adapter = MAKERS["boft"](unet)
    perturb(adapter)
    before = adapter.state()
    adapter.save(tmp_path / "unet")
    perturb(adapter)
    adapter.load(tmp_path / "unet")
    assert_same(before, adapter.state())


def test_another_adapter_is_refused(unet, toy_base, tmp_path):
    MAKERS["boft"](unet).save(tmp_path / "unet")
    other = UNet2DConditionModel.from_pretrained(toy_base, subfolder="unet")
    with pytest.raises(InputError, match="cannot be loaded"):
        MAKERS["boft everywhere"](other).load(tmp_path / "unet")


def test_the_scale_has_its_own_rate_and_does_not_decay(unet):
    adapter = MAKERS["boft"](unet)
    groups = adapter.parameter_groups(1e-2, 1e-1, scale_rate=1e-3)
    found = {(g["lr"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in groups}
    scales = sum(p.numel() for name, p in adapter.named_trainables() if "boft_s" in name)
    assert found == {(1e-2, 1e-1): adapter.count() - scales, (1e-3, 0.0): scales}


def test_a_frozen_scale_is_not_trained(unet):
    adapter = add_boft(unet, ["attention"], block_size=4, train_scale=False)
    assert adapter.count() > 0
    assert not any("boft_s" in name for name, _ in adapter.named_trainables())
    with disabled([adapter]):
        pass
    assert not any("boft_s" in name for name, _ in adapter.named_trainables())


def test_trainables_are_float32_on_a_base_in_half_precision(unet):
    adapter = add_boft(unet.bfloat16(), ["attention"], block_size=4, bias="boft_only")
    assert {p.dtype for _, p in adapter.named_trainables()} == {torch.float32}


def test_presets_grow(unet):
    counts = [len(target_modules([preset], unet, "--f")) for preset in UNET_PRESETS]
    assert counts == sorted(set(counts))
    assert target_modules(["to_q,to_k"], unet, "--f") == ["to_q", "to_k"]


def test_rotation_angle_of_a_known_rotation():
    """S = [[0, λ], [-λ, 0]] turns its plane by 2·atan(λ) under the Cayley map."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapter = add_boft(module, ["0"], block_size=2)
    for name, parameter in adapter.named_trainables():
        if "boft_R" in name:
            parameter.data[..., 0, 1] = 2 * math.tan(math.radians(15))
    assert adapter.rotation_angle() == pytest.approx(30, abs=1e-3)


def test_a_block_size_that_does_not_divide_names_the_flag(unet):
    with pytest.raises(InputError, match="--boft_block_size=7"):
        add_boft(unet, ["attention"], block_size=7)


def test_full_training_trains_all(unet):
    adapter = train_fully(unet)
    assert adapter.count() == sum(p.numel() for p in unet.parameters())
