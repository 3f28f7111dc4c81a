"""What was trained in the formats of other programs: each file is read back by the library that reads such files."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_pipeline
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_inference import MAKERS, answer, write_run
from transformers import CLIPTextConfig, CLIPTextModel

from boft.layer import BOFTLayer
from finetuning.adapters.adapter import ADAPTER_WEIGHTS, add_boft, add_lora
from finetuning.adapters.pipelines import load_adapter, load_base, load_run, merge_adapter, set_strength
from finetuning.errors import InputError
from finetuning.export.lora import kohya_name, save_lora, smallest_rank, weight_changes
from finetuning.export.original_layout import original_layout
from finetuning.export.peft import inverse_cayley, save_for_peft
from finetuning.export.single_file import save_single_file
from finetuning.pictures.generation import PictureOrder, draw
from finetuning.settings.reading import run_command
from scripts import export, merge


@pytest.fixture(scope="module")
def sd2_base(tmp_path_factory) -> Path:
    """The layout of Stable Diffusion 2: linear projections around attention, OpenCLIP's text encoder."""
    folder = build_pipeline(
        tmp_path_factory.mktemp("sd2_base"),
        channels=(16, 32, 32),
        vae_channels=(8, 8),
        latent_channels=4,
        max_length=24,
        sample_size=8,
        width=16,
        prediction_type="v_prediction",
    )
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder", hidden_act="gelu")
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    pipeline = load_base(str(folder))
    unet = type(pipeline.unet).from_config({**pipeline.unet.config, "use_linear_projection": True})
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def run(toy_base, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("export") / "mug", toy_base, MAKERS["boft with biases"])


def script(module, *arguments: object) -> int:
    return run_command(module.main, [str(argument) for argument in arguments])


# Pipelines and checkpoints


def test_a_merged_pipeline_is_the_unmerged_one(run, tmp_path, capsys):
    assert script(merge, "--adapter", f"{run}:0.6", "--output_dir", tmp_path / "merged") == 0
    assert "lost: the adapters" in capsys.readouterr().out
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
    unmerged = load_base(str(merged.name_or_path))  # the same file through this project's door
    torch.testing.assert_close(answer(merged), answer(unmerged))
    pipeline = load_run(run)
    set_strength(pipeline, 0.6)
    torch.testing.assert_close(answer(merged), answer(pipeline), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["toy_base", "sd15_base", "sd2_base"])
def test_a_single_file_draws_the_same_pictures(base, request, tmp_path):
    base = request.getfixturevalue(base)
    run = write_run(tmp_path / "run", base, MAKERS["boft everywhere"])
    pipeline = load_run(run)
    before = answer(pipeline)
    lost = save_single_file(pipeline, tmp_path / "mug.safetensors")
    assert any("prediction type" in text for text in lost)
    read = StableDiffusionPipeline.from_single_file(
        tmp_path / "mug.safetensors", config=str(base), safety_checker=None
    )
    read.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "text_encoder"):
        left, right = getattr(pipeline, part).state_dict(), getattr(read, part).state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left), part
    torch.testing.assert_close(answer(read), before, rtol=1e-4, atol=1e-4)
    order = PictureOrder(
        "a red mug", seed=1, steps=2, size=pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    )
    read.unet.set_attn_processor(next(iter(pipeline.unet.attn_processors.values())))
    assert draw(read, [order])[0].tobytes() == draw(pipeline, [order])[0].tobytes()


def test_the_names_are_those_of_the_published_checkpoint(sd15_base, tmp_path):
    pipeline = load_base(str(sd15_base))
    save_single_file(pipeline, tmp_path / "base.safetensors", "fp16")
    tensors = load_file(tmp_path / "base.safetensors")
    assert {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.up.3.block.0.norm1.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    } <= tensors.keys()
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_models_of_another_layout_are_refused(toy_base):
    pipeline = load_base(str(toy_base))
    unet, vae, text = (getattr(pipeline, part).state_dict() for part in ("unet", "vae", "text_encoder"))

    def convert(weights=unet, act="quick_gelu", **config):
        return original_layout(weights, vae, text, {**pipeline.unet.config, **config}, pipeline.vae.config, act)

    with pytest.raises(InputError, match="addition_embed_type: the layout of Stable Diffusion"):
        convert(addition_embed_type="text_time")
    with pytest.raises(InputError, match="SimpleCrossAttnDownBlock2D"):
        convert(down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"))
    with pytest.raises(InputError, match=r"add_embedding\.linear_1\.weight"):
        convert({**unet, "add_embedding.linear_1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="activation is relu"):
        convert(act="relu")


# LoRA


@pytest.mark.parametrize("kind", ["boft everywhere", "lora"])
def test_a_lora_of_full_rank_is_the_adapter_and_a_cut_one_keeps_what_it_says(kind, toy_base, tmp_path):
    run = write_run(tmp_path / "run", toy_base, MAKERS[kind])
    pipeline = load_run(run)
    changes = {(part, name): change for part, name, change in weight_changes(pipeline)}
    report, _ = save_lora(pipeline, tmp_path / "full.safetensors", rank=10**6)
    assert all(row.energy > 0.99999 for row in report)
    other = load_base(str(toy_base))
    other.load_lora_weights(tmp_path / "full.safetensors")
    merge_adapter(pipeline)
    torch.testing.assert_close(answer(other), answer(pipeline), rtol=1e-3, atol=1e-4)

    pipeline = load_run(run)
    report, lost = save_lora(pipeline, tmp_path / "cut.safetensors", rank=None, energy=0.8)
    tensors = load_file(tmp_path / "cut.safetensors")
    assert "squared change of the weights" in lost[0]
    for row in report:
        part, _, name = row.layer.partition(".")
        key, change = kohya_name(part, name), changes[part, name].flatten(1)
        up, down = tensors[f"{key}.lora_up.weight"].flatten(1), tensors[f"{key}.lora_down.weight"].flatten(1)
        assert row.rank == up.shape[1]
        scale = tensors[f"{key}.alpha"] / row.rank
        share = 1 - (change - scale * up @ down).square().sum() / change.square().sum()
        assert share == pytest.approx(row.energy, abs=1e-4) and row.energy >= 0.8


def test_an_export_computes_each_rotated_weight_once(toy_base, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", toy_base, MAKERS["boft everywhere"])
    computed = []
    rotate = BOFTLayer.effective_weight

    def counted(layer, *arguments):
        computed.append(id(layer.get_base_layer()))
        return rotate(layer, *arguments)

    monkeypatch.setattr(BOFTLayer, "effective_weight", counted)
    assert script(export, "--format", "lora", "--adapter", run, "--output", tmp_path / "mug.safetensors") == 0
    report = [key for key in load_file(tmp_path / "mug.safetensors") if key.endswith(".alpha")]
    assert len(computed) == len(set(computed)) == len(report) > 40


def test_export_says_that_a_lora_loses_nothing(toy_base, tmp_path, capsys):
    run = write_run(tmp_path / "run", toy_base, MAKERS["lora"])
    flags = ("--format", "lora", "--adapter", run, "--output")
    assert script(export, *flags, tmp_path / "lora.safetensors") == 0
    said = capsys.readouterr().out
    assert "nothing lost" in said and "lost:" not in said
    stored = load_file(run / "unet" / ADAPTER_WEIGHTS)
    written = {key: tensor for key, tensor in load_file(tmp_path / "lora.safetensors").items() if "_te_" not in key}
    for key, tensor in stored.items():
        layer, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        name = f"{kohya_name('unet', layer)}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"
        assert torch.equal(written.pop(name), tensor)
    assert {float(tensor) for tensor in written.values()} == {3.0}  # alpha

    assert script(export, *flags, tmp_path / "cut.safetensors", "--energy", 0.5) == 0
    assert "squared change of the weights" in capsys.readouterr().out


def test_the_rank_that_reaches_a_share():
    kept = torch.tensor([0.5, 0.8, 1.0])
    assert [smallest_rank(kept, energy) for energy in (0.3, 0.5, 0.51, 0.8, 0.9, 1.0, 1.01)] == [1, 1, 2, 2, 3, 3, 3]


# Stock peft


def test_stock_peft_computes_what_we_do(toy_base, tmp_path):
    makers = {
        "factors": lambda module: add_boft(module, ["all"], block_size=4, factors=2),
        "biases": MAKERS["boft with biases"],
        "lora": lambda module: add_lora(module, ["attention"], rank=2, alpha=3),
    }
    expected = {}
    for kind, make in makers.items():
        run = write_run(tmp_path / "runs" / kind, toy_base, make)
        pipeline = load_base(str(toy_base))
        load_adapter(pipeline, run, 0.7)
        save_for_peft(pipeline, tmp_path / kind)
        expected[kind] = answer(pipeline)
    code = """
import inspect, sys, torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import PeftModel
ANSWER
for kind in KINDS:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipeline.unet.set_attn_processor(AttnProcessor())
    for part in ("unet", "text_encoder"):
        PeftModel.from_pretrained(getattr(pipeline, part), f"{FOLDER}/{kind}/{part}")
    torch.save(answer(pipeline), f"{FOLDER}/{kind}.pt")
assert "boft" not in sys.modules
"""
    code = code.replace("ANSWER", inspect.getsource(answer)).replace("KINDS", repr(list(makers)))
    code = code.replace("BASE", repr(str(toy_base))).replace("{FOLDER}", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for kind in makers:
        torch.testing.assert_close(torch.load(tmp_path / f"{kind}.pt"), expected[kind], rtol=1e-3, atol=1e-4)


def test_the_inverse_of_the_cayley_map():
    R = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))
    S, I = 0.5 * (R - R.mT), torch.eye(8)
    Q = (I - S) @ torch.linalg.inv(I + S)
    torch.testing.assert_close(inverse_cayley(Q), S, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="half a turn"):
        inverse_cayley(-torch.eye(2)[None])
