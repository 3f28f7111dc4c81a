"""A run folder of an earlier version goes on: it is resumed, loaded, reported and merged.

`tests/data/earlier_run` was made by an earlier version of the trainer on a base of random weights. It gave --use_boft
without a block size, which that version recorded as null and took to be 8. The checkpoint is of step 2, the result of
step 4.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
from training import flags, run, weights

from finetuning.adapters.pipelines import load_adapter, load_base
from finetuning.publishing.report import write_report
from finetuning.settings.reading import run_command
from finetuning.training.checkpoint import load_state
from scripts import merge

EARLIER = Path(__file__).parent / "data" / "earlier_run"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of base, photos and run, whose configuration says where the base is now."""
    copy = Path(shutil.copytree(EARLIER, tmp_path / "earlier"))
    config = copy / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("/tmp/earlier", str(copy)), encoding="utf-8")
    return copy


def resume(folder: Path, *more: str) -> int:
    arguments = flags(folder / "base", folder / "photos", folder / "run", adapter=("--use_boft", *more))
    return run(*arguments, "--resume_from_checkpoint=checkpoint-2")


@pytest.mark.parametrize("more", [[], ["--boft_block_size=8"]], ids=str)
def test_its_checkpoint_is_resumed(more, folder):
    recorded = load_state(folder / "run" / "checkpoint-2")["config"]
    assert recorded["boft_block_size"] is None and recorded["boft_block_num"] is None
    wanted = weights(folder / "run")
    assert resume(folder, *more) == 0
    found = weights(folder / "run")
    assert found.keys() == wanted.keys()
    for name in wanted:  # on another processor, the last bits may differ
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [["--boft_block_size=4"], ["--boft_block_num=2"]], ids=str)
def test_another_block_size_than_was_meant_is_refused(more, folder, capsys):
    assert resume(folder, *more) == 2
    assert "--boft_block_size" in (error := capsys.readouterr().err) and "made with 8" in error


def test_its_adapter_is_loaded(folder):
    pipeline = load_base(str(folder / "base"))
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    load_adapter(pipeline, folder / "run")
    features = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"timestep": 500, "encoder_hidden_states": torch.ones(1, 24, 8)}
    adapted = pipeline.unet(features, **call).sample
    plain = load_base(str(folder / "base")).unet
    assert not torch.allclose(adapted, plain(features, **call).sample)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_its_report_is_written(folder):
    page = write_report(folder / "run").read_text(encoding="utf-8")
    assert "a photo of qwe mug" in page and "boft" in page.lower()


def test_it_is_merged_into_its_base(folder, tmp_path):
    arguments = ["--adapter", str(folder / "run"), f"--output_dir={tmp_path / 'merged'}"]
    assert not run_command(merge.main, arguments)
    merged, plain = load_base(str(tmp_path / "merged")).unet, load_base(str(folder / "base")).unet
    changed = [
        name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, merged.state_dict()[name])
    ]
    assert changed and all("attn" in name for name in changed)
