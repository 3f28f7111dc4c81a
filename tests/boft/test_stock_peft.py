"""Checkpoints go both ways between this package and stock peft, which runs in a process of its own."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from dense import net, randomize
from peft import PeftModel, get_peft_model

from boft import BOFTConfig

TARGETS = ["first", "second", "conv"]

STOCK = """
import sys, warnings
sys.path[:0] = [{here!r}]
import torch, peft
from dense import net, randomize
assert "boft" not in sys.modules
x = torch.load({folder!r} + "/x.pt")
"""


def stock(folder, script):
    """Runs a script with stock peft; `net`, `randomize`, `peft`, `torch` and x are there."""
    here = str(Path(__file__).parent)
    code = STOCK.format(here=here, folder=str(folder)) + script.replace("FOLDER", repr(str(folder)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def x(tmp_path):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    torch.save(x, tmp_path / "x.pt")
    return x


def test_stock_peft_loads_ours(tmp_path, x):
    ours = randomize(get_peft_model(net(), BOFTConfig(boft_block_size=4, target_modules=TARGETS)))
    ours.save_pretrained(tmp_path / "ours")
    messages = stock(
        tmp_path,
        """
model = peft.PeftModel.from_pretrained(net(), FOLDER + "/ours", is_trainable=True)
y = model(x)
y.square().sum().backward()
torch.save([y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}], FOLDER + "/answer.pt")
""",
    )
    assert "Unexpected keyword" not in messages
    y, gradients = torch.load(tmp_path / "answer.pt")
    ours_y = ours(x)
    torch.testing.assert_close(ours_y, y)
    ours_y.square().sum().backward()
    computed = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert computed.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(computed[name], gradients[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [1, 2])
def test_ours_loads_stock_pefts(tmp_path, x, m):
    # Without a compiler, stock peft trains m = 1 whatever it was asked for, and writes the m that it was asked for.
    stock(
        tmp_path,
        f"""
config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor={m}, target_modules=["first", "second"])
model = randomize(peft.get_peft_model(net(), config))
model.save_pretrained(FOLDER + "/theirs")
torch.save([model(x), next(p for n, p in model.named_parameters() if "boft_R" in n).shape[0]], FOLDER + "/answer.pt")
""",
    )
    y, true_m = torch.load(tmp_path / "answer.pt")
    loaded = PeftModel.from_pretrained(net(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), y)
    assert loaded.peft_config["default"].boft_n_butterfly_factor == true_m


def test_unregister_gives_peft_its_own_classes_back():
    import boft

    boft.unregister()
    try:
        model = get_peft_model(net(), peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS))
        assert type(model.base_model) is peft.BOFTModel
    finally:
        boft.register()
    model = get_peft_model(net(), peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS))
    assert type(model.base_model) is boft.BOFTModel
