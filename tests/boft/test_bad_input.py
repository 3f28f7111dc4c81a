"""What cannot be done is an error that says what to change, before anything is trained."""

import pytest
from dense import net
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from boft import BOFTConfig
from boft.shape import fits, resolve


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"boft_block_size": 4, "boft_block_num": 8}, "boft_block_size=4 and boft_block_num=8: give one"),
        ({"boft_block_size": 0, "boft_block_num": 0}, "one of the two must be given"),
        ({"bias": "lora_only"}, "bias='lora_only' must be one of 'none', 'all', 'boft_only'"),
        ({"boft_dropout": 1.0}, r"boft_dropout=1.0 must lie in \[0, 1\)"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor=0 must be 1 or more"),
        ({"boft_block_size": -4}, "boft_block_size=-4 must be a whole number"),
        ({"boft_block_size": 4.0}, "boft_block_size=4.0 must be a whole number"),
        ({"bias": "x", "boft_dropout": 2}, "boft_dropout=2 .*; bias='x'"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        BOFTConfig(**fields)


def test_target_that_matches_nothing():
    with pytest.raises(ValueError, match=r"nowhere.* not found in the base model"):
        get_peft_model(net(), BOFTConfig(target_modules=["nowhere"]))


def test_unsupported_layers_are_all_named_and_nothing_is_replaced():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "deep": nn.Conv3d(4, 4, 1)})
    with pytest.raises(TypeError, match=r"norm \(LayerNorm\), deep \(Conv3d\).*Supported are torch.nn.Linear"):
        get_peft_model(model, BOFTConfig(target_modules=["a", "norm", "deep"]))
    assert type(model["a"]) is nn.Linear


@pytest.mark.parametrize("d", [12, 36, 48, 80])
def test_suggested_values_fit(d):
    for b in range(1, d + 1):
        for m in range(1, 6):
            if fits(d, b, m):
                assert resolve(d, b, 0, m) == (b, d // b) == resolve(d, 0, d // b, m)
                continue
            with pytest.raises(
                ValueError, match=f"b={b} with boft_n_butterfly_factor m={m} does not fit d={d}"
            ) as error:
                resolve(d, b, 0, m)
            for proposal in str(error.value).split("nearest that fit: ")[1].split(", or "):
                if proposal.startswith("none"):
                    continue
                values, fixed = proposal.split(" with ")
                name, numbers = values.split("=")
                for number in numbers.split(" or "):
                    assert fits(d, int(number), m) if name == "b" else fits(d, b, int(number)), proposal
                assert fixed in (f"m={m}", f"b={b}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("half", "attribute of this name"), ("keys", "attribute"), ("training", "attribute"), ("v1.5", "without dots"),
     ("", "without dots")],
)  # fmt: skip
def test_adapter_names_that_torch_cannot_hold(name, reason, tmp_path):
    """From every entry, and nothing is left behind."""
    config = BOFTConfig(boft_block_size=4, target_modules=["first"])
    model, bare, injected = get_peft_model(net(), config), net(), net()
    model.save_pretrained(tmp_path)
    inject_adapter_in_model(config, injected)
    for add in (
        lambda: get_peft_model(bare, config, adapter_name=name),
        lambda: PeftModel.from_pretrained(bare, tmp_path, adapter_name=name),
        lambda: inject_adapter_in_model(config, injected, name),
        lambda: model.add_adapter(name, config),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.base_model.add_weighted_adapter(["default"], [1.0], name),
    ):
        with pytest.raises(ValueError, match=f"adapter name {name!r}: .*{reason}.*choose another"):
            add()
    assert type(bare.first) is nn.Linear
    assert list(model.peft_config) == list(injected.peft_config) == ["default"]
    assert list(model.base_model.model.first.boft_R) == ["default"]
