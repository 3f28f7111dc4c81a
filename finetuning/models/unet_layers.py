"""The layers of a UNet, and of a CLIP text encoder, that each preset of the --…_target_modules flags stands for.

Names are endings of module names, in diffusers' UNet and in transformers' CLIP.
"""

from __future__ import annotations

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "fc1", "fc2"]
AROUND = ["proj_in", "proj_out"]
RESIDUAL = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
UNET_PRESETS = {
    "attention": ATTENTION,
    "attention+feed-forward": ATTENTION + FEED_FORWARD,
    "transformer": ATTENTION + FEED_FORWARD + AROUND,
    "all": ATTENTION + FEED_FORWARD + AROUND + RESIDUAL,
}
