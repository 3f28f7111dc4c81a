"""What a base model does beside what its trainers ask of it."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from finetuning.stable_diffusion import choose_attention


@pytest.mark.parametrize("sample_size, keeps_maps", [(16, True), (64, False)])
def test_attention_maps_are_kept_by_models_of_small_pictures_only(sample_size, keeps_maps):
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    choose_attention(unet, torch.device("cpu"), xformers=False)
    sizes, tokens = [], 16 * 16
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 3, 4)).sample.sum().backward()
    assert (max(sizes) >= tokens**2) == keeps_maps
