"""Train the toy world's base model, its CLIP and its judge from nothing, and write them in the libraries' own formats.

python -m toyworld.pretrain                     # all stages, about three hours on two cores; the same command resumes
python -m toyworld.pretrain --stages measure    # measure what lies in data/toyworld

Stages: renders, tokenizer, vae, clip, judge, segmentation, latents, unet, export, measure. VAE on the one hand, CLIP
and judge on the other run side by side; the UNet trains on all cores. Work in progress lies in --work_dir, float16
results in --output_dir.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from . import clip, judge, renders, segmentation, subjects, tokenizer, unet, vae
from .measure import measure

STAGES = ("renders", "tokenizer", "vae", "clip", "judge", "segmentation", "latents", "unet", "export", "measure")
STEPS = {
    "vae": 3_300,
    "clip": 1_300,
    "judge_attributes": 1_000,
    "judge_instances": 1_500,
    "judge_segmentation": segmentation.STEPS,
    "unet": 2_000,
}


# Each stage takes the folder of work in progress and the number of processes.


def render_sets(work: Path, workers: int) -> None:
    """Render all sets of pictures."""
    for name in renders.SIZES:
        renders.images(work, name, workers)


def train_tokenizer(work: Path, workers: int) -> None:
    """Build the tokenizer from the words of captions."""
    tokenizer.build(work / "tokenizer")


def train_vae(work: Path, workers: int) -> None:
    """Train the autoencoder."""
    vae.train(renders.images(work, "train"), work, STEPS["vae"]).save_pretrained(work / "vae")


def train_clip(work: Path, workers: int) -> None:
    """Train the small CLIP, and keep its text tower as the pipeline's text encoder."""
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    model = clip.train(renders.images(work, "train"), words, work, STEPS["clip"])
    model.save_pretrained(work / "clip")
    words.save_pretrained(work / "clip")
    text_encoder = CLIPTextModel(model.config.text_config)
    text_encoder.load_state_dict(model.text_model.state_dict())
    text_encoder.save_pretrained(work / "text_encoder")


def train_judge(work: Path, workers: int) -> None:
    """Train the two networks that judge attributes and individuals."""
    generator = torch.Generator().manual_seed(79)
    reader = judge.train_attributes(work, workers, STEPS["judge_attributes"])
    judge.recalibrate(reader, renders.images(work, "judge"), generator)
    reader.save_pretrained(work / "judge" / "attributes")
    identifier = judge.train_instances(work, workers, STEPS["judge_instances"])
    judge.recalibrate(identifier, renders.images(work, "individuals"), generator)
    identifier.save_pretrained(work / "judge" / "instances")


def train_segmentation(work: Path, workers: int) -> None:
    """Train the network that judges masks."""
    segmentation.train(work, STEPS["judge_segmentation"]).save_pretrained(work / "judge" / "segmentation")


def encode_latents(work: Path, workers: int) -> None:
    """Encode all pictures of the set "train" once."""
    model = AutoencoderKL.from_pretrained(work / "vae")
    torch.save(vae.encode(model, renders.images(work, "train")).half(), work / "latents.pt")


def train_unet(work: Path, workers: int) -> None:
    """Train the UNet on the latents."""
    unet.train(work, work, STEPS["unet"], workers)


def export(work: Path, output: Path) -> None:
    """Write everything in float16 and in the libraries' own formats."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=DDIMScheduler(**unet.SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(output / "base")
    CLIPModel.from_pretrained(work / "clip").half().save_pretrained(output / "clip")
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(output / "clip")
    networks: dict[str, type[judge.Network]] = {
        "attributes": judge.AttributeJudge,
        "instances": judge.InstanceJudge,
        "segmentation": segmentation.SegmentationJudge,
    }
    for name, network in networks.items():
        network.load(work / "judge" / name).half().save_pretrained(output / "judge" / name)
    subjects.write(output / "subjects")


_DONE = {  # what a finished stage leaves in the work folder
    "tokenizer": "tokenizer/tokenizer.json",
    "vae": "vae/config.json",
    "clip": "text_encoder/config.json",
    "judge": "judge/instances/config.json",
    "segmentation": "judge/segmentation/config.json",
    "latents": "latents.pt",
    "unet": "unet/config.json",
}
_RUN: dict[str, Callable[[Path, int], None]] = {
    "renders": render_sets,
    "tokenizer": train_tokenizer,
    "vae": train_vae,
    "clip": train_clip,
    "judge": train_judge,
    "segmentation": train_segmentation,
    "latents": encode_latents,
    "unet": train_unet,
}


def _run(stages: list[str], work: Path, workers: int, threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    for stage in stages:
        if not (stage in _DONE and (work / _DONE[stage]).exists()):
            _RUN[stage](work, workers)


def _side_by_side(groups: list[list[str]], work: Path, workers: int) -> None:
    """Run each group of stages in a process of its own, with an equal share of the cores."""
    threads = max(1, workers // len(groups))
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_run, args=(group, work, workers, threads)) for group in groups]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a stage failed; its error stands above, and the same command goes on from there")


def main() -> None:
    """Run the stages that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which to run, in this order")
    parser.add_argument("--work_dir", type=Path, default=Path("data/cache/pretrain"))
    parser.add_argument("--output_dir", type=Path, default=Path("data/toyworld"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; one thread each")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for phase in (["renders"], ["tokenizer"]):
        _run([stage for stage in phase if stage in args.stages], args.work_dir, args.workers, args.workers)
    sides = [
        [stage for stage in side if stage in args.stages] for side in (["vae"], ["clip", "judge", "segmentation"])
    ]
    if any(sides):
        _side_by_side([side for side in sides if side], args.work_dir, args.workers)
    _run([stage for stage in ("latents", "unet") if stage in args.stages], args.work_dir, args.workers, args.workers)
    if "export" in args.stages:
        export(args.work_dir, args.output_dir)
    if "measure" in args.stages:
        result = measure(args.output_dir)
        (args.output_dir / "measured.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
