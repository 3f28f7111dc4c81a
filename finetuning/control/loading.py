"""From the folder of a ControlNet run to a pipeline that draws."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from finetuning.adapters.folder import ADAPTER_CONFIG, load_run_config, local_folder
from finetuning.adapters.pipelines import load_adapter
from finetuning.control.network import CONTROL_PARTS, HintEncoder, load_complete
from finetuning.control.pipeline import LightControlPipeline, control_pipeline
from finetuning.errors import InputError
from finetuning.models.attention import choose_attention
from finetuning.models.loading import load_stable_diffusion


def load_control_run(
    run: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LightControlPipeline | StableDiffusionControlNetPipeline:
    """The pipeline that a run of train_controlnet.py has trained: base, hint encoder or ControlNet, and adapter.

    Args:
        run: the run's folder, or the name of the repository on the hub that it was uploaded to.
        device: where the pipeline goes.
        dtype: precision of its weights.

    Raises:
        InputError: if the folder is not that of a ControlNet run, or the run has not ended.
    """
    run = local_folder(run)
    config = load_run_config(run)
    if "conditioning_channels" not in config:
        raise InputError(f"{run}: is a run of train_dreambooth.py; give one of train_controlnet.py")
    is_light = (run / CONTROL_PARTS["light"]).is_dir()
    try:
        control = (
            load_complete(HintEncoder, run / CONTROL_PARTS["light"])
            if is_light
            else load_complete(ControlNetModel, run)
        )
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{run}: holds no sound hint encoder or ControlNet; has the run ended? {text}") from error
    name = config["pretrained_model_name_or_path"]
    base = load_stable_diffusion(name, config.get("revision"), config.get("variant"), config.get("tokenizer_name"))
    pipeline = control_pipeline(base, control.eval()).to(device, dtype)
    pipeline.register_to_config(_name_or_path=name)
    choose_attention(pipeline.unet, pipeline.device, False)
    if (run / "unet" / ADAPTER_CONFIG).is_file():
        load_adapter(pipeline, run)
    return pipeline
