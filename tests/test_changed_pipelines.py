"""Pipelines that other programs change: what is on them is still right, or the change is refused with a remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_inference import MAKERS, answer, weights, write_run

from finetuning.adapters.pipelines import (
    get_strengths,
    load_adapter,
    load_base,
    merge_adapter,
    mix_adapters,
    set_strength,
    strengths,
    unload_adapter,
)
from finetuning.errors import InputError
from finetuning.export.lora import save_lora
from finetuning.export.peft import save_for_peft
from finetuning.export.pipeline import save_pipeline
from finetuning.export.single_file import save_single_file

CPU = torch.device("cpu")
KINDS = ("boft with biases", "lora")


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: write_run(folder / kind.replace(" ", "_"), toy_base, MAKERS[kind]) for kind in KINDS}


@pytest.fixture
def pipeline(toy_base):
    return load_base(str(toy_base))


@pytest.fixture(scope="module")
def foreign_lora(toy_base, tmp_path_factory):
    """A LoRA file as diffusers writes and reads it, on the UNet."""
    pipeline = load_base(str(toy_base))
    torch.manual_seed(1)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("foreign")
    pipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="default")
    )
    return folder


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Offloading


def sequential(pipeline):  # what enable_sequential_cpu_offload does to each part, which wants a GPU
    for part in (pipeline.unet, pipeline.text_encoder):
        cpu_offload(part, CPU)


def grouped(pipeline):
    for part in (pipeline.unet, pipeline.text_encoder):
        apply_group_offloading(part, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def whole(pipeline):  # what enable_model_cpu_offload does
    for part in (pipeline.unet, pipeline.text_encoder):
        cpu_offload_with_hook(part, CPU)


OFFLOADED = {"layer by layer": sequential, "in groups": grouped}


@pytest.mark.parametrize("way", OFFLOADED)
def test_offloading_by_layer_is_refused_and_draws_what_was_set_before(way, runs, pipeline, tmp_path):
    with pytest.raises(InputError, match=rf"offloaded {way}.*then offload"):
        other = load_base(pipeline.name_or_path)
        OFFLOADED[way](other)
        load_adapter(other, runs["lora"])
    assert get_strengths(other) == {}
    load_adapter(pipeline, runs["lora"], 0.7)
    tuned = answer(pipeline)
    OFFLOADED[way](pipeline)
    assert torch.equal(answer(pipeline), tuned)
    for refused in (
        lambda: load_adapter(pipeline, runs["lora"]),
        lambda: set_strength(pipeline, 0.2),
        lambda: mix_adapters(pipeline, {"lora": 1}, "mixed"),
        lambda: unload_adapter(pipeline),
        lambda: merge_adapter(pipeline),
        lambda: save_lora(pipeline, tmp_path / "x.safetensors"),
        lambda: save_for_peft(pipeline, tmp_path / "x"),
        lambda: save_pipeline(pipeline, tmp_path / "x"),
        lambda: save_single_file(pipeline, tmp_path / "x.safetensors"),
    ):
        with pytest.raises(InputError, match=f"offloaded {way}"):
            refused()
    assert get_strengths(pipeline) == {"lora": 0.7} and torch.equal(answer(pipeline), tuned)
    assert not list(tmp_path.iterdir())


def test_weights_that_come_back_from_offloading_can_be_changed_again(runs, pipeline):
    base, tensors = answer(pipeline), weights(pipeline)
    load_adapter(pipeline, runs["boft with biases"])
    tuned = answer(pipeline)
    sequential(pipeline)
    for part in (pipeline.unet, pipeline.text_encoder):
        remove_hook_from_module(part, recurse=True)
    set_strength(pipeline, 0)
    assert torch.equal(answer(pipeline), base)
    set_strength(pipeline, 1)
    assert torch.equal(answer(pipeline), tuned)
    unload_adapter(pipeline)
    assert same(weights(pipeline), tensors) and all(p.requires_grad for p in pipeline.unet.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_offloading_of_whole_models_goes_together_with_adapters(kind, runs, pipeline):
    base = answer(pipeline)
    load_adapter(pipeline, runs[kind], 0.5, name="one")
    half = answer(pipeline)
    unload_adapter(pipeline)
    whole(pipeline)
    load_adapter(pipeline, runs[kind], name="one")
    set_strength(pipeline, 0.5)
    assert torch.equal(answer(pipeline), half)
    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), base)


def test_fused_projections_are_refused(runs, pipeline):
    pipeline.fuse_qkv_projections(unet=True, vae=False)
    base = answer(pipeline)
    with pytest.raises(InputError, match=r"projections are fused.*unfuse_qkv_projections"):
        load_adapter(pipeline, runs["lora"])
    assert get_strengths(pipeline) == {} and torch.equal(answer(pipeline), base)
    pipeline.unfuse_qkv_projections(unet=True, vae=False)
    load_adapter(pipeline, runs["lora"])
    tuned = answer(pipeline)
    pipeline.fuse_qkv_projections(unet=True, vae=False)
    for refused in (lambda: set_strength(pipeline, 0), lambda: unload_adapter(pipeline)):
        with pytest.raises(InputError, match="projections are fused"):
            refused()
    pipeline.unfuse_qkv_projections(unet=True, vae=False)
    assert torch.equal(answer(pipeline), tuned)
    unload_adapter(pipeline)
    torch.testing.assert_close(answer(pipeline), base, rtol=1e-4, atol=1e-5)


# Pipelines that share parts


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_of_the_same_parts_carry_the_same_adapters(kind, runs, toy_base, pipeline, tmp_path):
    base, tensors = answer(pipeline), weights(pipeline)
    other = write_run(tmp_path / "other", toy_base, MAKERS[kind], seed=4)
    load_adapter(pipeline, runs[kind], 0.5, name="one")
    half = answer(pipeline)
    second = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert get_strengths(second) == {"one": 0.5}
    with pytest.raises(InputError, match="is on the pipeline"):
        load_adapter(second, other, name="one")
    load_adapter(second, other, name="two")
    assert get_strengths(pipeline) == {"one": 0.5, "two": 1} and torch.equal(answer(pipeline), answer(second))
    with strengths(second, {"two": 0}):
        assert torch.equal(answer(pipeline), half)
    unload_adapter(pipeline)
    assert get_strengths(second) == {} and torch.equal(answer(second), base) and same(weights(second), tensors)


def test_parts_in_several_pipelines_at_strengths_of_their_own(runs, toy_base, pipeline):
    load_adapter(pipeline, runs["lora"], name="one")
    other = load_base(str(toy_base))
    other.unet = pipeline.unet
    set_strength(other, 0.5)
    with pytest.raises(InputError, match=r"one: its strength is 1 on the text_encoder and 0.5 on the other part"):
        get_strengths(pipeline)
    set_strength(pipeline, 0.5)
    assert get_strengths(pipeline) == get_strengths(other) == {"one": 0.5}


def test_a_replaced_unet_takes_its_adapters_along(runs, toy_base, pipeline):
    base, own = answer(pipeline), pipeline.unet
    load_adapter(pipeline, runs["boft with biases"], name="one")
    tuned = answer(pipeline)
    pipeline.unet = UNet2DConditionModel.from_pretrained(toy_base, subfolder="unet")
    pipeline.unet.set_attn_processor(own.attn_processors)
    set_strength(pipeline, 0)
    assert torch.equal(answer(pipeline), base)
    load_adapter(pipeline, runs["lora"] / "unet", name="two")
    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), base) and get_strengths(pipeline) == {}
    pipeline.unet = own
    assert get_strengths(pipeline) == {"one": 1}
    load_adapter(pipeline, runs["boft with biases"] / "text_encoder", name="its text")
    assert torch.equal(answer(pipeline), tuned)
    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_pipeline_has_adapters_of_its_own(kind, runs, pipeline):
    base = answer(pipeline)
    load_adapter(pipeline, runs[kind], name="one")
    tuned = answer(pipeline)
    twin = copy.deepcopy(pipeline)
    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), base) and torch.equal(answer(twin), tuned)
    unload_adapter(twin)
    assert torch.equal(answer(twin), base)


def test_a_layer_that_was_replaced_is_named(runs, pipeline):
    load_adapter(pipeline, runs["lora"])
    pipeline.unet.mid_block = copy.deepcopy(pipeline.unet.mid_block)
    for refused in (lambda: set_strength(pipeline, 0), lambda: unload_adapter(pipeline)):
        with pytest.raises(InputError, match=r"unet\.mid_block.*no longer the layer"):
            refused()


# LoRAs of diffusers


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_diffusers_on_top_stays_and_goes(kind, runs, foreign_lora, pipeline, tmp_path):
    base = answer(pipeline)
    pipeline.load_lora_weights(foreign_lora)
    alone = answer(pipeline)
    with pytest.raises(InputError, match=r"carries an adapter of another program.*unload_lora_weights"):
        load_adapter(pipeline, runs[kind])
    assert torch.equal(answer(pipeline), alone)
    pipeline.unload_lora_weights()

    load_adapter(pipeline, runs[kind], name="one")
    tuned = answer(pipeline)
    pipeline.load_lora_weights(foreign_lora)
    both = answer(pipeline)
    assert min((both - tuned).abs().max(), (both - alone).abs().max()) > 1e-2
    set_strength(pipeline, 0)
    assert torch.equal(answer(pipeline), alone)
    set_strength(pipeline, 1)
    assert torch.equal(answer(pipeline), both)
    for refused in (
        lambda: load_adapter(pipeline, runs[kind]),
        lambda: mix_adapters(pipeline, {"one": 1}, "mixed"),
        lambda: save_lora(pipeline, tmp_path / "x.safetensors"),
        lambda: save_pipeline(pipeline, tmp_path / "x"),
    ):
        with pytest.raises(InputError, match="carries an adapter of another program"):
            refused()
    pipeline.unload_lora_weights()
    assert torch.equal(answer(pipeline), tuned)
    pipeline.load_lora_weights(foreign_lora)
    unload_adapter(pipeline)
    assert torch.equal(answer(pipeline), alone)
    pipeline.unload_lora_weights()
    assert torch.equal(answer(pipeline), base)


@pytest.mark.parametrize("keep", [True, False])
def test_a_lora_that_is_fused_into_the_weights_is_not_lost(keep, runs, foreign_lora, pipeline):
    load_adapter(pipeline, runs["lora"])
    pipeline.load_lora_weights(foreign_lora)
    pipeline.fuse_lora()
    if not keep:
        pipeline.unload_lora_weights()
    fused = answer(pipeline)
    for refused in (lambda: set_strength(pipeline, 0), lambda: unload_adapter(pipeline)):
        with pytest.raises(InputError, match=r"its weight was changed by somebody else.*unfuse_lora"):
            refused()
    assert torch.equal(answer(pipeline), fused)
    if keep:
        pipeline.unfuse_lora()
        pipeline.unload_lora_weights()
        unload_adapter(pipeline)
        assert same(weights(pipeline), weights(load_base(pipeline.name_or_path)))


def test_rounding_to_another_dtype_is_no_change(runs, pipeline):
    tensors = weights(pipeline)
    load_adapter(pipeline, runs["boft with biases"])
    pipeline.to(torch.bfloat16).to(torch.float32)
    set_strength(pipeline, 0.5)
    pipeline.to(torch.float16)
    unload_adapter(pipeline)
    after = weights(pipeline)
    adapted = [name for name in tensors if ".to_q.weight" in name]
    assert adapted and all(torch.equal(after[name], tensors[name].half()) for name in adapted)


# Layers that cannot be adapted


def test_layers_whose_weight_cannot_be_replaced_are_named(runs, pipeline):
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1

    def refused(match):
        base = answer(pipeline)
        with pytest.raises(InputError, match=rf"unet\.mid_block.*{match}"):
            load_adapter(pipeline, runs["lora"])
        assert get_strengths(pipeline) == {} and torch.equal(answer(pipeline), base)

    torch.nn.utils.parametrizations.weight_norm(layer.to_q)
    refused("computed anew at every look-up")
    torch.nn.utils.parametrize.remove_parametrizations(layer.to_q, "weight")
    layer.to_k.weight = layer.to_q.weight
    refused("shares its weight")
