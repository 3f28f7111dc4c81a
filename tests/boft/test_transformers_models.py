"""Models of transformers through peft's calls: two steps of training, save, load, the same outputs."""

import copy

import pytest
import torch
from dense import randomize
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MT5Config,
    MT5ForConditionalGeneration,
)

from boft import BOFTConfig, BOFTLayer

IDS = torch.arange(12).view(2, 6)


def dinov2():
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, num_labels=3)
    inputs = {"pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    return Dinov2ForImageClassification(config), inputs | {"labels": torch.tensor([0, 2])}


def mt5():
    config = MT5Config(vocab_size=20, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return MT5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}


def gpt2():
    config = GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=8)
    return GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}


BOFT_ON_DINOV2 = BOFTConfig(
    boft_block_size=4,
    boft_n_butterfly_factor=2,
    target_modules=["query", "value", "key", "output.dense", "mlp.fc1", "mlp.fc2"],
    boft_dropout=0.1,
    bias="boft_only",
    modules_to_save=["classifier"],
)
BOFT_ON_GPT2 = BOFTConfig(
    boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
)
BOFT_ON_MT5 = BOFTConfig(boft_block_size=4, target_modules=["q", "v", "wo"], task_type=TaskType.SEQ_2_SEQ_LM)
LORA_ON_MT5 = LoraConfig(r=4, target_modules=["q", "v"], task_type=TaskType.SEQ_2_SEQ_LM)


@pytest.mark.parametrize(
    "build, config",
    [(dinov2, BOFT_ON_DINOV2), (mt5, LORA_ON_MT5), (mt5, BOFT_ON_MT5), (gpt2, BOFT_ON_GPT2)],
    ids=["Dinov2 with BOFT", "mT5 with LoRA", "mT5 with BOFT", "GPT-2 with BOFT"],
)
def test_trains_saves_and_loads(build, config, tmp_path):
    torch.manual_seed(0)
    base, inputs = build()
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    start = [p.detach().clone() for p in parameters]
    losses = []
    for _ in range(3):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, before) for p, before in zip(parameters, start))

    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_gpt2_layer_rotates_its_transposed_weight():
    torch.manual_seed(0)
    base, inputs = gpt2()
    base.eval()
    expected = base(**inputs).logits
    config = BOFTConfig(boft_block_size=8, target_modules=["c_attn"])
    with pytest.warns(UserWarning, match=r"Conv1D stores its weight as \(in, out\). Setting fan_in_fan_out=True"):
        model = get_peft_model(base, config).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    randomize(model)
    layer = next(module for module in model.modules() if isinstance(module, BOFTLayer))
    y = model(**inputs).logits
    weight = layer.effective_weight(["default"])
    assert weight.shape == layer.weight.shape == (32, 96)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), x @ weight + layer.bias, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, y)


def test_layers_to_transform_and_exclude_modules():
    base, _ = gpt2()
    config = BOFTConfig(
        boft_block_size=8,
        target_modules=["c_attn", "c_fc"],
        exclude_modules=["mlp.c_fc"],
        layers_to_transform=[1],
        layers_pattern="h",
        fan_in_fan_out=True,
    )
    model = get_peft_model(base, config)
    assert model.base_model.targeted_module_names == ["transformer.h.1.attn.c_attn"]
