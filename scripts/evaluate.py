#!/usr/bin/env python
"""Score what runs have trained.

    python scripts/evaluate.py dreambooth data/output               # every run below: DINO, CLIP-I, CLIP-T; tables
    python scripts/evaluate.py pictures --generated=made --real=photos --prompts=prompts.txt --class_word=mug
    python scripts/evaluate.py toyworld data/output/dreambooth      # an embedded subject, by the toy world's own judge
    python scripts/evaluate.py controlnet data/output/controlnet    # how pictures follow the controls of a run

Pictures and tables go into evaluation/ of a run; `toyworld` also writes scores.json into the folder of each run. To go
on after an interruption, run the same command again.

`controlnet` detects the control again in pictures drawn by held-out controls and compares: edges (canny; IoU, and F1
within 0.75 % of the diagonal), segments (mean IoU), landmarks of faces. Beside it stand pictures without control, the
floor, and the real pictures, the ceiling. Pictures in which a detector finds nothing are counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.evaluation import (
    CLIP,
    COMMANDS,
    DINO,
    ControlScoreConfig,
    DreamBoothScoreConfig,
    EncoderSettings,
    PictureScoreConfig,
    ToyworldScoreConfig,
)
from finetuning.settings.fields import Config
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(COMMANDS, __doc__)  # before the slow imports

import torch

from finetuning.adapters.pipelines import load_base, load_run, load_run_config
from finetuning.control.consistency import Detector, load_landmarks
from finetuning.control.scoring import ControlTest, Drawing, draw_control_run, score_control_run
from finetuning.dataset.stream import find_images
from finetuning.dreambooth import scoring as dreambooth_scoring
from finetuning.dreambooth.picture_scores import SCORE_NAMES, Encoders, overview, score_run_pictures, summary
from finetuning.dreambooth.prompts import SubjectPhrase, read_templates
from finetuning.dreambooth.scoring import find_runs, read_subject, score_run
from finetuning.errors import InputError
from finetuning.evaluation.encoders import Encoder, Preprocessing, load_clip, load_dino
from finetuning.evaluation.lpips import load_lpips
from finetuning.evaluation.score_table import as_json, markdown, mean_of, write, write_table
from finetuning.files import save_picture
from finetuning.pictures.gallery import read_gallery, weights_of
from finetuning.pictures.generation import choose_scheduler
from finetuning.run.device import choose_device
from finetuning.run_folder import COMPARISON, EVALUATION, GRID, SCORES, WITHOUT_CONTROL
from toyworld.controls import Controls
from toyworld.judge import InstanceJudge
from toyworld.measure import generate
from toyworld.scores import Judges, score
from toyworld.segmentation import load_segmentation
from toyworld.subjects import SUBJECTS

DATA = Path(__file__).resolve().parents[1] / "data" / "toyworld"


# Encoders


def load_encoders(chosen: EncoderSettings, device: torch.device, is_toy: bool) -> Encoders:
    """The networks that the flags ask for. By default they are the protocol's, and the embedded ones on the toy world.

    Raises:
        InputError: if a network cannot be loaded; the message names its flag.
    """
    lpips = load_lpips(chosen.lpips_alexnet, chosen.lpips_linear, str(device)) if chosen.lpips else None
    fidelity: dict[str, Encoder] = {}
    if (dino := chosen.dino or ("none" if is_toy else DINO)) != "none":
        fidelity["DINO"] = load_dino(dino, str(device))
    if is_toy and (DATA / "judge").is_dir():
        fidelity["Judge"] = judge_encoder(DATA / "judge", device)
    if (clip := chosen.clip or (str(DATA / "clip") if is_toy else CLIP)) != "none":
        fidelity["CLIP-I"] = load_clip(clip, str(device))
    if not fidelity:
        raise InputError("--dino=none and --clip=none: nothing is left to score with; give one of them")
    return Encoders(fidelity, fidelity.get("CLIP-I"), lpips)


def judge_encoder(folder: Path, device: torch.device) -> Encoder:
    """The toy world's judge of individuals as an encoder. It had no part in training the base or an adapter."""
    judge = InstanceJudge.from_pretrained(folder / "instances").to(device).eval()
    half = (0.5, 0.5, 0.5)
    return Encoder("toyworld/judge", Preprocessing((64, 64), None, 3, half, half), judge, device=device)


def is_toy(config: dict) -> bool:
    """Whether a run was trained on the embedded base, whose pictures other encoders were not made for."""
    return Path(config["pretrained_model_name_or_path"]).resolve() == (DATA / "base").resolve()


# Scoring


def dreambooth(config: DreamBoothScoreConfig) -> None:
    """Score every run of a tree by DreamBooth's protocol."""
    scored, root, device = config.scored, Path(config.scored.runs), choose_device(config.work.device)
    runs = find_runs(root)
    configs = [load_run_config(run) for run in runs]
    subjects = [
        read_subject(run_config, scored.instance_data_dir, scored.prompts, scored.class_word) for run_config in configs
    ]
    of_kind = {kind: load_encoders(config.encoders, device, kind) for kind in dict.fromkeys(map(is_toy, configs))}
    drawing = dreambooth_scoring.Drawing(
        images_per_prompt=scored.images_per_prompt,
        seed=config.drawing.seed,
        batch_size=config.work.batch_size,
        device=device,
        steps=config.drawing.num_inference_steps,
        guidance_scale=config.drawing.guidance_scale,
        precision=config.drawing.mixed_precision,
        overwrite=config.drawing.overwrite,
    )
    results = [
        score_run(run, run_config, subject, of_kind[is_toy(run_config)], drawing)
        for run, run_config, subject in zip(runs, configs, subjects)
    ]
    names = [str(run.relative_to(root)) if run != root else run.name for run in runs]
    rows = [summary(result, run=name) for name, result in zip(names, results)]
    table_rows = list(rows)
    if len(rows) > 1:
        table_rows.append({"run": "mean over runs", **{s: mean_of(rows, s) for s in SCORE_NAMES if s in rows[0]}})
        folder = root / EVALUATION
        write_table(folder, "subjects", table_rows)
        write_table(folder, "prompts", [{"run": n, **row} for n, r in zip(names, results) for row in r["prompts"]])
        save_picture(overview(runs, names, subjects, scored.images_per_prompt), folder / GRID)
    real = [{**result["real"], "run": "real photos"} for result in results]
    if means := {s: mean_of(real, s) for s in SCORE_NAMES if s in real[0]}:
        table_rows.append({"run": "real photos", **means})
    print(markdown(table_rows, [c for c in ("run", "subject", "pictures", "excluded", *SCORE_NAMES) if c in rows[0]]))
    result = {"runs": dict(zip(names, results)), "table": table_rows}
    if len(rows) > 1:
        write(root / EVALUATION / SCORES, as_json(result))
    print(f"{root / EVALUATION}: tables (csv, md, json), pictures and {GRID}")


def pictures(config: PictureScoreConfig) -> None:
    """Score pictures that were made elsewhere."""
    scored, generated = config.scored, Path(config.scored.generated)
    templates = read_templates(scored.prompts)
    phrase = SubjectPhrase("", scored.class_word)
    images, each = read_gallery(generated, templates, "--generated")
    photos = find_images(Path(scored.real), "--real")
    texts = [phrase.without_token(t) for t in templates]
    encoders = load_encoders(config.encoders, choose_device(config.work.device), is_toy=False)
    repeated = [text for text in texts for _ in range(each)]
    result = score_run_pictures(generated.name, images, repeated, texts, photos, encoders, config.work.batch_size)
    result = {"protocol": {"encoders": encoders.describe()}, **result}
    folder = Path(scored.output) if scored.output else generated / EVALUATION
    write(folder / SCORES, as_json(result))
    write_table(folder, "prompts", result["prompts"])
    rows = [summary(result, of=str(generated)), {"of": "real photos", **result["real"]}]
    write_table(folder, "subjects", rows)
    print(markdown(rows))


def toyworld(config: ToyworldScoreConfig) -> None:
    """Score runs on embedded subjects beside their base; runs that have been scored in the same way are left alone."""
    scored, root, device = config.scored, Path(config.scored.runs), choose_device(config.scored.device)
    runs = find_runs(root)
    subjects = [embedded_subject(load_run_config(run)) for run in runs]
    draw = partial(generate, steps=scored.num_inference_steps, guidance=scored.guidance_scale)
    record = {"steps": scored.num_inference_steps, "guidance": scored.guidance_scale, "scheduler": scored.scheduler}
    judged: dict[tuple, tuple] = {}  # (subject, base) to the judges, and the scores and pictures of the base

    def drawing(pipeline) -> partial:
        pipeline.scheduler = choose_scheduler(pipeline, scored.scheduler)
        return partial(draw, pipeline)

    results = {}
    for run, subject in zip(runs, subjects):
        name, path = str(run.relative_to(root)) if run != root else run.name, run / SCORES
        key = {"scoring": record, "weights": weights_of(run)}
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if {k: found.get(k) for k in key} != key:
            which = subject, load_run_config(run)["pretrained_model_name_or_path"]
            if which not in judged:
                judges = Judges(DATA / "judge", subject)
                judged[which] = judges, *score(drawing(load_base(which[1]).to(device)), judges, word="")
            judges, base, pictures = judged[which]
            tuned, _ = score(drawing(load_run(run).to(device)), judges, base=pictures)
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
        write_table(root / EVALUATION, "toyworld", rows)
    elif (picture := runs[0] / COMPARISON).is_file():
        print(f"the picture: {picture}")


def embedded_subject(config: dict) -> str:
    """The name of the subject of a run.

    Raises:
        InputError: if it is not one of the toy world's subjects.
    """
    card = Path(config["instance_data_dir"]) / "subject.json"
    subject = json.loads(card.read_text(encoding="utf-8"))["name"] if card.is_file() else None
    if subject not in SUBJECTS:
        raise InputError(
            f"--instance_data_dir={config['instance_data_dir']}: not an embedded subject, and the toy world's judge "
            f"knows no other; it has {', '.join(SUBJECTS)}"
        )
    return subject


def controlnet(config: ControlScoreConfig) -> None:
    """Score how the pictures of a ControlNet run follow their controls."""
    scored, run, device = config.scored, Path(config.scored.run), choose_device(config.work.device)
    more: dict[str, Detector] = {"landmarks": load_landmarks(str(device))} if scored.landmarks else {}
    test = ControlTest.from_run(
        run,
        lambda kind, part: Controls(kind, "test" if part == "held out" else part),
        load_segmentation,
        count=scored.images,
        segmentation_model=scored.segmentation_model,
        more=more,
    )
    drawing = Drawing(
        seed=config.drawing.seed,
        steps=config.drawing.num_inference_steps,
        guidance_scale=config.drawing.guidance_scale,
        scale=scored.controlnet_conditioning_scale,
        guess_mode=scored.guess_mode,
        precision=config.drawing.mixed_precision,
        batch_size=config.work.batch_size,
        device=str(device),
    )
    floor = None if scored.only_draw else run / EVALUATION / WITHOUT_CONTROL
    drawn = draw_control_run(run, test, drawing, every=scored.every, overwrite=config.drawing.overwrite, floor=floor)
    rows = [] if scored.only_draw else score_control_run(run, test, drawn)
    print(markdown(rows) if rows else "drawn, not scored")
    print(f"control, result, overlay: {run / EVALUATION / GRID}; tables beside it")


# The command line

RUN: dict[type[Config], Callable[..., None]] = {
    DreamBoothScoreConfig: dreambooth,
    PictureScoreConfig: pictures,
    ToyworldScoreConfig: toyworld,
    ControlScoreConfig: controlnet,
}


def main(argv: Sequence[str] | None = None) -> int:
    return evaluate(read_config(COMMANDS, argv, __doc__))


def evaluate(config: Config) -> int:
    """Run the command whose settings these are; returns the exit code."""
    RUN[type(config)](config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: evaluate(config)))
