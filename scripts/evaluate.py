#!/usr/bin/env python
"""Score what runs have trained.

    python scripts/evaluate.py dreambooth data/output               # every run below: DINO, CLIP-I, CLIP-T; tables
    python scripts/evaluate.py pictures --generated=made --real=photos --prompts=prompts.txt --class_word=mug
    python scripts/evaluate.py toyworld data/output/dreambooth      # an embedded subject, by the toy world's own judge
    python scripts/evaluate.py controlnet data/output/controlnet    # how pictures follow the controls of a run

`dreambooth` follows DreamBooth's protocol: 25 prompts, 4 pictures each; cosine over all real × generated pairs; CLIP-T
by the prompt without the rare token; blackened pictures excluded and counted. Pictures and tables go into evaluation/
of a run. To go on after an interruption, run the same command again. `pictures` scores what other programs have made.

`toyworld` writes scores.json into the folder of each run and prints a table of the base models and the tuned ones.

`controlnet` detects the control again in pictures drawn by held-out controls and compares: edges (canny; IoU, and F1
within 0.75 % of the diagonal), segments (mean IoU), landmarks of faces. Beside it stand pictures without control, the
floor, and the real pictures, the ceiling. Where a detector fails, the picture is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from finetuning.adapters.pipelines import load_base, load_run, load_run_config
from finetuning.control.consistency import load_landmarks
from finetuning.control.scoring import ControlTest, Drawing, draw_control_run, score_control_run
from finetuning.dataset.stream import find_images
from finetuning.dreambooth import scoring as dreambooth_scoring
from finetuning.dreambooth.picture_scores import SCORE_NAMES, Encoders, overview, score_run_pictures, summary
from finetuning.dreambooth.prompts import SubjectPhrase, read_templates
from finetuning.dreambooth.scoring import find_runs, read_subject, score_run
from finetuning.errors import InputError
from finetuning.evaluation.lpips import load_lpips
from finetuning.evaluation.score_table import as_json, markdown, mean_of, write, write_table
from finetuning.evaluation.scores import Encoder, Preprocessing, load_clip, load_dino
from finetuning.files import save_picture
from finetuning.pictures.gallery import read_gallery, weights_of
from finetuning.pictures.generation import SCHEDULERS, choose_scheduler
from finetuning.run.device import choose_device
from finetuning.run_folder import COMPARISON, EVALUATION, GRID, SCORES, WITHOUT_CONTROL
from finetuning.settings.fields import run_command
from toyworld.controls import Controls
from toyworld.judge import InstanceJudge
from toyworld.measure import generate
from toyworld.scores import Judges, score
from toyworld.segmentation import load_segmentation
from toyworld.subjects import SUBJECTS

DATA = Path(__file__).resolve().parents[1] / "data" / "toyworld"
DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-large-patch14"


# Encoders


def load_encoders(args: argparse.Namespace, is_toy: bool) -> Encoders:
    """What the flags ask for; by default the protocol's models, and the embedded ones on the toy world.

    Raises:
        InputError: one cannot be loaded; names its flag.
    """
    lpips = load_lpips(args.lpips_alexnet, args.lpips_linear, args.device) if args.lpips else None
    fidelity: dict[str, Encoder] = {}
    if (dino := args.dino or ("none" if is_toy else DINO)) != "none":
        fidelity["DINO"] = load_dino(dino, args.device)
    if is_toy and (DATA / "judge").is_dir():
        fidelity["Judge"] = judge_encoder(DATA / "judge", args.device)
    if (clip := args.clip or (str(DATA / "clip") if is_toy else CLIP)) != "none":
        fidelity["CLIP-I"] = load_clip(clip, args.device)
    if not fidelity:
        raise InputError("--dino=none and --clip=none: nothing is left to score with; give one of them")
    return Encoders(fidelity, fidelity.get("CLIP-I"), lpips)


def judge_encoder(folder: Path, device: torch.device) -> Encoder:
    """The toy world's judge of individuals, which had no part in training."""
    judge = InstanceJudge.from_pretrained(folder / "instances").to(device).eval()
    half = (0.5, 0.5, 0.5)
    return Encoder("toyworld/judge", Preprocessing((64, 64), None, 3, half, half), judge, device=device)


def is_toy(config: dict) -> bool:
    """Whether a run's base is the embedded one, which other encoders know nothing of."""
    return Path(config["pretrained_model_name_or_path"]).resolve() == (DATA / "base").resolve()


# Scoring


def dreambooth(args: argparse.Namespace) -> dict:
    """Score every run of a tree; returns what the tree's scores.json holds."""
    runs = find_runs(args.runs)
    configs = [load_run_config(run) for run in runs]
    subjects = [read_subject(config, args.instance_data_dir, args.prompts, args.class_word) for config in configs]
    of_kind = {kind: load_encoders(args, kind) for kind in dict.fromkeys(map(is_toy, configs))}
    drawing = dreambooth_scoring.Drawing(
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        batch_size=args.batch_size,
        device=args.device,
        steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        precision=args.mixed_precision,
        overwrite=args.overwrite,
    )
    results = [
        score_run(run, config, subject, of_kind[is_toy(config)], drawing)
        for run, config, subject in zip(runs, configs, subjects)
    ]
    names = [str(run.relative_to(args.runs)) if run != args.runs else run.name for run in runs]
    rows = [summary(result, run=name) for name, result in zip(names, results)]
    table_rows = list(rows)
    if len(rows) > 1:
        table_rows.append({"run": "mean over runs", **{s: mean_of(rows, s) for s in SCORE_NAMES if s in rows[0]}})
        folder = args.runs / EVALUATION
        write_table(folder, "subjects", table_rows)
        write_table(folder, "prompts", [{"run": n, **row} for n, r in zip(names, results) for row in r["prompts"]])
        save_picture(overview(runs, names, subjects, args.images_per_prompt), folder / GRID)
    real = [{**result["real"], "run": "real photos"} for result in results]
    if scored := {s: mean_of(real, s) for s in SCORE_NAMES if s in real[0]}:
        table_rows.append({"run": "real photos", **scored})
    print(markdown(table_rows, [c for c in ("run", "subject", "pictures", "excluded", *SCORE_NAMES) if c in rows[0]]))
    result = {"runs": dict(zip(names, results)), "table": table_rows}
    if len(rows) > 1:
        write(args.runs / EVALUATION / SCORES, as_json(result))
    print(f"{args.runs / EVALUATION}: tables (csv, md, json), pictures and {GRID}")
    return result


def pictures(args: argparse.Namespace) -> dict:
    """Score pictures that were made elsewhere."""
    templates = read_templates(args.prompts)
    phrase = SubjectPhrase("", args.class_word)
    images, each = read_gallery(args.generated, templates, "--generated")
    photos = find_images(args.real, "--real")
    texts = [phrase.without_token(t) for t in templates]
    encoders = load_encoders(args, is_toy=False)
    repeated = [text for text in texts for _ in range(each)]
    result = score_run_pictures(args.generated.name, images, repeated, texts, photos, encoders, args.batch_size)
    result = {"protocol": {"encoders": encoders.describe()}, **result}
    folder = args.output or args.generated / EVALUATION
    write(folder / SCORES, as_json(result))
    write_table(folder, "prompts", result["prompts"])
    rows = [summary(result, of=str(args.generated)), {"of": "real photos", **result["real"]}]
    write_table(folder, "subjects", rows)
    print(markdown(rows))
    return result


def toyworld(args: argparse.Namespace) -> dict[str, dict]:
    """Score runs on embedded subjects beside their base, {run: what its scores.json holds}; what is scored is kept."""
    runs = find_runs(args.runs)
    subjects = [embedded_subject(load_run_config(run)) for run in runs]
    draw = partial(generate, steps=args.num_inference_steps, guidance=args.guidance_scale)
    record = {"steps": args.num_inference_steps, "guidance": args.guidance_scale, "scheduler": args.scheduler}
    judged: dict[tuple, tuple] = {}  # of each subject and base

    def drawing(pipeline) -> partial:
        pipeline.scheduler = choose_scheduler(pipeline, args.scheduler)
        return partial(draw, pipeline)

    results = {}
    for run, subject in zip(runs, subjects):
        name, path = str(run.relative_to(args.runs)) if run != args.runs else run.name, run / SCORES
        key = {"scoring": record, "weights": weights_of(run)}
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if {k: found.get(k) for k in key} != key:
            which = subject, load_run_config(run)["pretrained_model_name_or_path"]
            if which not in judged:
                judges = Judges(DATA / "judge", subject)
                judged[which] = judges, *score(drawing(load_base(which[1]).to(args.device)), judges, word="")
            judges, base, pictures = judged[which]
            tuned, _ = score(drawing(load_run(run).to(args.device)), judges, base=pictures)
            found = {"subject": subject, **key, "base": asdict(base), "tuned": asdict(tuned)}
            write(path, as_json(found))
        results[name] = found
    rows = [
        {"run": name, **found[model]} if model == "tuned" else {"run": f"{name}: base model", **found[model]}
        for name, found in results.items()
        for model in ("base", "tuned")
    ]
    print(markdown(rows))
    print("subject: 0 = like any other of its class, 1 = the subject itself")
    if len(runs) > 1:
        write_table(args.runs / EVALUATION, "toyworld", rows)
    elif (picture := runs[0] / COMPARISON).is_file():
        print(f"the picture: {picture}")
    return results


def embedded_subject(config: dict) -> str:
    """The name of a run's subject.

    Raises:
        InputError: the toy world does not know it.
    """
    card = Path(config["instance_data_dir"]) / "subject.json"
    subject = json.loads(card.read_text(encoding="utf-8"))["name"] if card.is_file() else None
    if subject not in SUBJECTS:
        raise InputError(
            f"--instance_data_dir={config['instance_data_dir']}: not an embedded subject, and the toy world's judge "
            f"knows no other; it has {', '.join(SUBJECTS)}"
        )
    return subject


def controlnet(args: argparse.Namespace) -> list[dict]:
    """Score a ControlNet run; returns the table's rows."""
    more = {"landmarks": load_landmarks(str(args.device))} if args.landmarks else {}
    test = ControlTest.from_run(
        args.runs,
        lambda kind, part: Controls(kind, "test" if part == "held out" else part),
        load_segmentation,
        count=args.images,
        segmentation_model=args.segmentation_model,
        more=more,
    )
    drawing = Drawing(
        seed=args.seed,
        steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        scale=args.controlnet_conditioning_scale,
        guess_mode=args.guess_mode,
        precision=args.mixed_precision,
        batch_size=args.batch_size,
        device=args.device,
    )
    floor = None if args.only_draw else args.runs / EVALUATION / WITHOUT_CONTROL
    drawn = draw_control_run(args.runs, test, drawing, every=args.every, overwrite=args.overwrite, floor=floor)
    rows = [] if args.only_draw else score_control_run(args.runs, test, drawn)
    print(markdown(rows) if rows else "drawn, not scored")
    print(f"control, result, overlay: {args.runs / EVALUATION / GRID}; tables beside it")
    return rows


# Flags


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the pictures' noise (default: 0)")
    parser.add_argument("--num_inference_steps", type=at_least(1), metavar="N", help="(default: as in the run)")
    parser.add_argument("--guidance_scale", type=float, metavar="X", help="(default: as in the run)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="of the generation")
    parser.add_argument("--overwrite", action="store_true", help="make pictures anew that were made otherwise")


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=at_least(1), default=8, metavar="N", help="pictures at a time")
    add_device_flag(parser)


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="where everything runs (default: the fastest there is)")


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dino", metavar="NAME", help=f"DINO ViT: hub name, local folder, or none (default: {DINO})")
    parser.add_argument("--clip", metavar="NAME", help=f"CLIP: hub name, local folder, or none (default: {CLIP})")
    parser.add_argument("--lpips", action="store_true", help="also LPIPS, which needs the two files below")
    parser.add_argument("--lpips_alexnet", metavar="FILE", help="torchvision's alexnet-owt-7be5be79.pth")
    parser.add_argument("--lpips_linear", metavar="FILE", help="the lpips package's weights/v0.1/alex.pth")
    add_batch_flags(parser)


def at_least(least: int):
    """An argparse type: whole numbers from `least` on."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("dreambooth", help="a run or a tree of runs, by DreamBooth's protocol")
    command.add_argument("runs", type=Path, help="the --output_dir of a run, or a folder with several")
    command.add_argument(
        "--instance_data_dir", metavar="DIR", help="the photos, if they are no longer where they were"
    )
    command.add_argument(
        "--class_word", metavar="WORD", help="of the subject, e.g. mug (default: found in the prompts)"
    )
    command.add_argument(
        "--prompts", metavar="FILE", help="templates with {} for the subject (default: the protocol's)"
    )
    command.add_argument("--images_per_prompt", type=at_least(1), default=4, metavar="N", help="(default: 4)")
    add_drawing_flags(command)
    add_encoder_flags(command)
    command.set_defaults(run=dreambooth)

    command = commands.add_parser("pictures", help="pictures that were made elsewhere")
    command.add_argument("--generated", type=Path, required=True, metavar="DIR", help="pictures, prompt after prompt")
    command.add_argument("--real", type=Path, required=True, metavar="DIR", help="photos of the subject")
    command.add_argument("--prompts", required=True, metavar="FILE", help="templates with {} for the subject")
    command.add_argument("--class_word", required=True, metavar="WORD", help="what CLIP-T calls the subject")
    command.add_argument("--output", type=Path, metavar="DIR", help="(default: evaluation/ beside the pictures)")
    add_encoder_flags(command)
    command.set_defaults(run=pictures)

    command = commands.add_parser("toyworld", help="embedded subjects, by the toy world's own judge")
    command.add_argument("runs", type=Path, help="the --output_dir of a run, or a folder with several")
    command.add_argument("--num_inference_steps", type=at_least(1), default=25, metavar="N", help="(default: 25)")
    command.add_argument("--guidance_scale", type=float, default=3.0, metavar="X", help="(default: 3)")
    command.add_argument(
        "--scheduler", choices=SCHEDULERS, help="e.g. dpm++, of which 12 steps do (default: the base's)"
    )
    add_device_flag(command)
    command.set_defaults(run=toyworld)

    command = commands.add_parser("controlnet", help="a run of train_controlnet.py: how controls are followed")
    command.add_argument("runs", type=Path, metavar="run", help="the --output_dir of a run")
    command.add_argument("--images", type=at_least(1), metavar="N", help="held-out samples (default: as in the run)")
    command.add_argument("--every", type=at_least(1), default=4, metavar="N", help="the grid shows every N-th sample")
    command.add_argument("--controlnet_conditioning_scale", type=float, metavar="X", help="(default: as in the run)")
    command.add_argument("--only_draw", action="store_true", help="pictures by the controls, without scores")
    command.add_argument("--guess_mode", action="store_true", help="no control in the unconditional half of guidance")
    command.add_argument(
        "--segmentation_model", metavar="NAME", help="also segments by this SegFormer, e.g. of the hub"
    )
    command.add_argument("--landmarks", action="store_true", help="also landmarks of faces, by face_alignment")
    add_drawing_flags(command)
    add_batch_flags(command)
    command.set_defaults(run=controlnet)
    args = parser.parse_args(argv)
    if "device" in args:
        args.device = choose_device(args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
