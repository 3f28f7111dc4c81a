"""The scores on cases with known answers; the command on real runs with tiny encoders made on the spot."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import numpy as np
import pytest
import torch
from conftest import build_tokenizer, draw_photo
from PIL import Image
from training import flags, run

from finetuning.dreambooth.prompts import LIVE_PROMPTS, OBJECT_PROMPTS, SubjectPhrase, find_subject_phrase
from finetuning.errors import InputError
from finetuning.evaluation import lpips as lpips_module
from finetuning.evaluation.encoders import IMAGENET, Preprocessing, load_clip, load_dino
from finetuning.evaluation.lpips import LPIPS, distance, load_lpips
from finetuning.evaluation.score_table import as_csv, as_json, markdown
from finetuning.evaluation.scores import (
    agreement,
    cosine,
    image_scores,
    is_blackened,
    score_pictures,
    text_scores,
)
from finetuning.evaluation.statistics import mean_and_interval
from finetuning.settings.reading import run_command

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


evaluate = load_script("evaluate")


# Known answers


def test_cosines_of_known_features():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, -5.0]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(cosine(a, b), torch.tensor([[1.0, 0.0], [half, -half]]).double())
    torch.testing.assert_close(image_scores(a, b), torch.tensor([0.5, 0.0]).double())
    torch.testing.assert_close(text_scores(a, b), torch.tensor([1.0, -half]).double())


def test_the_mean_of_pictures_is_the_mean_of_all_pairs():
    random = torch.Generator().manual_seed(0)
    generated, real = torch.randn(7, 5, generator=random), torch.randn(3, 5, generator=random)
    pairs = [float(torch.cosine_similarity(g, r, dim=0)) for g in generated for r in real]
    assert float(image_scores(generated, real).mean()) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_a_copy_of_the_photos_scores_as_the_photos_and_themselves():
    real = torch.eye(3)
    assert agreement(real) == 0
    assert agreement(torch.ones(3, 4)) == pytest.approx(1)
    assert math.isnan(agreement(torch.ones(1, 4)))
    torch.testing.assert_close(image_scores(real, real), torch.full((3,), 1 / 3).double())


def test_the_confidence_interval_is_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert mean == 3.5 and half == pytest.approx(2.571 * 1.870829 / math.sqrt(6), rel=1e-5)
    assert mean_and_interval([2.0])[0] == 2 and math.isnan(mean_and_interval([2.0])[1])
    assert mean_and_interval(range(1000))[1] == pytest.approx(1.9623 * 288.819 / math.sqrt(1000), rel=1e-3)


def test_blackened_is_black_in_every_pixel():
    black = Image.new("RGB", (4, 4))
    assert is_blackened(black)
    black.putpixel((3, 3), (0, 0, 1))
    assert not is_blackened(black)


def test_lpips_of_known_features():
    x, y = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    x[0, :, 0, 0], y[0, :, 0, 0] = torch.tensor([7.0, 0.0]), torch.tensor([0.0, 0.5])  # orthogonal there, empty beside
    weights = [torch.tensor([0.25, 0.5])]
    torch.testing.assert_close(distance([x], [y], weights), torch.tensor([(0.25 + 0.5) / 2]))
    torch.testing.assert_close(distance([x], [3 * x], weights), torch.zeros(1))


def write_lpips(folder: Path) -> tuple[Path, Path]:
    """Random weights under the names of torchvision's and lpips' files."""
    torch.manual_seed(0)
    model = LPIPS()
    state = {
        f"features.{place}.{part}": getattr(model.convolutions[i], part).data
        for i, place in enumerate(lpips_module._FEATURES)
        for part in ("weight", "bias")
    }
    torch.save({**state, "classifier.1.weight": torch.zeros(2)}, folder / "alexnet.pth")
    lines = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(lpips_module.WIDTHS)}
    torch.save(lines, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"


def test_lpips_is_a_distance(tmp_path):
    model = load_lpips(*map(str, write_lpips(tmp_path)))
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        ab, ba = model(images[:1], images[1:2]), model(images[1:2], images[:1])
        assert model(images, images).abs().max() == 0 and ab > 0
        torch.testing.assert_close(ab, ba)
        means = model.pairs(images[:1], images[1:])
        torch.testing.assert_close(means, ((ab + model(images[:1], images[2:])) / 2))


# Prompts


def test_prompts_with_and_without_the_token():
    words = find_subject_phrase("a photo of qwe stuffed animal", ["a photo of a stuffed animal"])
    assert words == SubjectPhrase("qwe", "stuffed animal")
    assert words.with_token("a {} in the snow") == "a qwe stuffed animal in the snow"
    assert words.without_token("a red {}") == "a red stuffed animal"
    assert words.without_token("a photo of {} on the beach") == "a photo of a stuffed animal on the beach"
    assert SubjectPhrase("qwe", "umbrella").without_token("a {} in the snow") == "an umbrella in the snow"
    assert words.template("a photo of qwe stuffed animal here") == "a photo of {} here"
    assert find_subject_phrase("a photo of qwe mug", class_word="mug") == SubjectPhrase("qwe", "mug")


def test_the_protocol_has_25_prompts_for_things_and_25_for_what_lives():
    assert len(set(OBJECT_PROMPTS)) == len(set(LIVE_PROMPTS)) == 25
    assert (
        SubjectPhrase("qwe", "dog").templates() == LIVE_PROMPTS
        and SubjectPhrase("qwe", "toy").templates() == OBJECT_PROMPTS
    )


@pytest.mark.parametrize("prompt", ["a photo of qwe", "a photo of a mug"])
def test_a_prompt_without_token_or_class_asks_for_the_class_word(prompt):
    with pytest.raises(InputError, match="--class_word"):
        find_subject_phrase(prompt, ["a photo of a mug"] if "mug" in prompt else ())


# Tables


def test_tables_show_what_is_not_known_as_such():
    rows = [{"run": "a|b", "x": 0.12345}, {"run": "c", "x": math.nan, "y": 3}]
    assert markdown(rows) == "| run | x | y |\n|---|--:|--:|\n| a\\|b | 0.123 | – |\n| c | – | 3 |\n"
    assert as_csv(rows) == "run,x,y\na|b,0.12345,\nc,,3\n"
    assert json.loads(as_json(rows))[1]["x"] is None


# Encoders


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a tiny DINO and a tiny CLIP with random weights."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**tiny, "image_size": 16, "patch_size": 8}
    ViTModel(ViTConfig(**vision), add_pooling_layer=False).save_pretrained(folder / "dino")
    vocabulary = build_tokenizer(folder / "clip", 24)
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    text = {**tiny, "vocab_size": vocabulary, "max_position_embeddings": 24, **ids}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder / "clip")
    return folder / "dino", folder / "clip"


def test_preprocessing_is_read_from_the_encoders_folder():
    default = Preprocessing((16, 16), None, 3, *IMAGENET)
    assert Preprocessing.read(None, default) == default
    clip = Preprocessing.read({"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}, default)
    assert (clip.resize, clip.crop) == (20, 16)
    assert Preprocessing.read({"size": 224}, default).resize == (224, 224)
    oblong = Image.new("RGB", (40, 20), (255, 0, 0))
    assert clip(oblong).shape == default(oblong).shape == (3, 16, 16)
    red = (1 - IMAGENET[0][0]) / IMAGENET[1][0]
    torch.testing.assert_close(clip(oblong)[0], torch.full((16, 16), red))


def test_encoders_agree_with_transformers_own_way(encoders):
    from transformers import CLIPModel, CLIPTokenizer, ViTModel

    dino, clip = load_dino(str(encoders[0])), load_clip(str(encoders[1]))
    photos = [draw_photo(i) for i in range(3)]
    pixels = torch.stack([clip.preprocessing(photo) for photo in photos])
    model, tokenizer = CLIPModel.from_pretrained(encoders[1]), CLIPTokenizer.from_pretrained(encoders[1])
    with torch.no_grad():
        texts = tokenizer(["a photo of a mug", "a red mug in the snow"], padding=True, return_tensors="pt")
        output = model(pixel_values=pixels, **texts)
        own = ViTModel.from_pretrained(encoders[0], add_pooling_layer=False)
        cls = own(torch.stack([dino.preprocessing(photo) for photo in photos])).last_hidden_state[:, 0]
    torch.testing.assert_close(dino.images(photos, 2), cls)
    similarity = cosine(clip.images(photos, 2), clip.texts(["a photo of a mug", "a red mug in the snow"]))
    torch.testing.assert_close(similarity.float(), output.image_embeds @ output.text_embeds.T, atol=1e-5, rtol=1e-4)


def test_blackened_pictures_count_nowhere(encoders):
    clip = load_clip(str(encoders[1]))
    real, good = [draw_photo(1), draw_photo(2)], [draw_photo(3), draw_photo(4)]
    kwargs = {"fidelity": {"CLIP-I": clip}, "text_encoder": clip}
    plain, reference = score_pictures(good, ["a mug"] * 2, real, **kwargs)
    mixed, same = score_pictures([good[0], Image.new("RGB", (9, 9)), good[1]], ["a mug", "x", "a mug"], real, **kwargs)
    for name in ("CLIP-I", "CLIP-T"):
        assert torch.isnan(mixed[name]).tolist() == [False, True, False]
        torch.testing.assert_close(mixed[name][[0, 2]], plain[name])
    assert reference == same


@pytest.mark.parametrize(
    ("load", "flag"), [(load_dino, "--dino"), (load_clip, "--clip")], ids=["dino", "clip"]
)  # fmt: skip
def test_an_encoder_that_is_not_there_names_its_flag(load, flag, encoders, tmp_path):
    for name, word in {"somebody/no-such": "local folder", str(tmp_path): "local folder"}.items():
        with pytest.raises(InputError, match=rf"{flag}=.*{word}.*{flag}=FOLDER") as error:
            load(name)
        assert "\n" not in str(error.value)
    other = encoders[1] if flag == "--dino" else encoders[0]
    with pytest.raises(InputError, match="is a model of type"):
        load(str(other))


# The command


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory) -> Path:
    """A tree of two real runs."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "photos").mkdir()
    for i in range(2):
        draw_photo(i, (24, 30)).save(folder / "photos" / f"{i}.png")
    for name in ("one", "two"):
        arguments = flags(toy_base, folder / "photos", folder / "runs" / name, "--max_train_steps=1")
        assert run(*arguments, f"--seed={len(name)}") == 0
    (folder / "prompts.txt").write_text("a {} in the snow\na photo of {} on the beach\n")
    return folder


def command(*arguments: object) -> int:
    return run_command(evaluate.main, [str(a) for a in arguments])


def small(runs: Path, encoders: tuple[Path, Path], *more: object, tree: str = "runs") -> list[object]:
    return [
        "dreambooth", runs / tree, f"--dino={encoders[0]}", f"--clip={encoders[1]}", "--class_word=mug",
        f"--prompts={runs / 'prompts.txt'}", "--images_per_prompt=2", "--num_inference_steps=2", *more,
    ]  # fmt: skip


def test_a_tree_of_runs(runs, encoders, capsys):
    assert command(*small(runs, encoders)) == 0
    printed = capsys.readouterr().out
    assert "| one |" in printed and "mean over runs" in printed and "real photos" in printed
    result = json.loads((runs / "runs" / "evaluation" / "scores.json").read_text())
    one = result["runs"]["one"]
    assert [row["prompt"] for row in one["prompts"]] == [
        "a qwe mug in the snow", "a photo of qwe mug on the beach",
    ]  # fmt: skip
    assert one["protocol"]["texts"] == ["a mug in the snow", "a photo of a mug on the beach"]
    assert one["protocol"]["encoders"]["DINO"]["resize"] == [16, 16]

    # By hand, from the pictures that lie there:
    dino, clip = load_dino(str(encoders[0])), load_clip(str(encoders[1]))
    photos = [Image.open(runs / "photos" / f"{i}.png") for i in range(2)]
    pictures = [Image.open(runs / f"runs/one/evaluation/pictures/{p:03d}-{k}.png") for p in range(2) for k in range(2)]
    lines = (runs / "runs" / "evaluation" / "subjects.csv").read_text().splitlines()
    table = {row["run"]: row for row in csv.DictReader(lines)}
    assert float(table["one"]["DINO"]) == pytest.approx(cosine(dino.images(pictures), dino.images(photos)).mean())
    assert float(table["one"]["CLIP-I"]) == pytest.approx(cosine(clip.images(pictures), clip.images(photos)).mean())
    texts = clip.texts([text for text in one["protocol"]["texts"] for _ in range(2)])
    assert float(table["one"]["CLIP-T"]) == pytest.approx(text_scores(clip.images(pictures), texts).mean())
    mean = np.mean([float(table[name]["DINO"]) for name in ("one", "two")])
    assert float(table["mean over runs"]["DINO"]) == pytest.approx(mean)
    for name in ("subjects.md", "prompts.csv", "grid.png"):
        assert (runs / "runs" / "evaluation" / name).is_file() and (runs / "runs/one/evaluation" / name).is_file()


def test_it_goes_on_where_it_was_and_depends_on_no_batch(runs, encoders):
    assert command(*small(runs, encoders, tree="runs/one")) == 0
    folder = runs / "runs/one/evaluation"
    before = {path: path.read_bytes() for path in (folder / "pictures").glob("*.png")}
    kept = folder / "pictures" / "000-0.png"
    untouched = kept.stat().st_mtime_ns
    (folder / "pictures" / "000-1.png").unlink()
    (folder / "scores.json").unlink()
    assert command(*small(runs, encoders, "--batch_size=1", tree="runs/one")) == 0
    assert kept.stat().st_mtime_ns == untouched and len(before) == 4
    for path, data in before.items():
        close = np.abs(np.asarray(Image.open(path), int) - np.asarray(Image.open(io.BytesIO(data)), int))
        assert close.max() <= 1, path
    written = (folder / "scores.json").stat().st_mtime_ns
    assert command(*small(runs, encoders, tree="runs/one")) == 0
    assert (folder / "scores.json").stat().st_mtime_ns == written, "nothing is scored again"


def test_pictures_made_otherwise_are_refused(runs, encoders, capsys):
    assert command(*small(runs, encoders, tree="runs/two")) == 0
    assert command(*small(runs, encoders, "--seed=5", tree="runs/two")) == 2
    assert "another seed" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert command(*small(runs, encoders, "--seed=5", "--overwrite", tree="runs/two")) == 0
    assert command(*small(runs, encoders, "--overwrite", tree="runs/two")) == 0


def test_pictures_from_elsewhere_with_one_blackened_and_lpips(runs, encoders, tmp_path, capsys):
    made = tmp_path / "made"
    made.mkdir()
    for i in range(4):
        draw_photo(i, (64, 64)).save(made / f"{i}.png")
    Image.new("RGB", (64, 64)).save(made / "4.png")
    draw_photo(9, (64, 64)).save(made / "10.png")
    alexnet, linear = write_lpips(tmp_path)
    arguments = [
        "pictures", f"--generated={made}", f"--real={runs / 'photos'}", f"--prompts={runs / 'prompts.txt'}",
        "--class_word=mug", f"--dino={encoders[0]}", f"--clip={encoders[1]}",
    ]  # fmt: skip
    lpips = ["--lpips", f"--lpips_alexnet={alexnet}", f"--lpips_linear={linear}"]
    assert command(*arguments, *lpips) == 0
    result = json.loads((made / "evaluation" / "scores.json").read_text())
    assert [row["excluded"] for row in result["prompts"]] == [0, 1]
    assert [row["LPIPS"] is None for row in result["by_picture"]] == [False] * 4 + [True, False]
    assert result["real"]["LPIPS"] > 0

    capsys.readouterr()
    (made / "10.png").unlink()
    assert command(*arguments) == 2
    assert "5 pictures for 2 prompts" in capsys.readouterr().err
    draw_photo(9, (64, 32)).save(made / "10.png")
    assert command(*arguments) == 2
    assert "mixed resolutions: 0.png is 64×64, 10.png is 64×32" in capsys.readouterr().err
    draw_photo(9, (64, 64)).save(made / "10.png")
    assert command(*arguments, "--lpips") == 2
    error = capsys.readouterr().err
    assert "--lpips_alexnet" in error and "--lpips_linear" in error and "alexnet-owt-7be5be79.pth" in error
    assert command(*arguments, "--lpips", f"--lpips_alexnet={linear}", f"--lpips_linear={linear}") == 2
    assert f"--lpips_alexnet={linear}" in capsys.readouterr().err


def test_embedded_subjects_are_judged_run_by_run(tmp_path, capsys):
    embedded = Path(__file__).parents[1] / "data" / "toyworld"
    arguments = flags(
        embedded / "base", embedded / "subjects" / "boat", tmp_path / "runs" / "a", "--max_train_steps=1"
    )
    assert run(*arguments, "--learning_rate=0", "--lr_scheduler=constant") == 0
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    few = ("--num_inference_steps=1", "--scheduler=ddim")
    assert command("toyworld", tmp_path / "runs", *few) == 0
    path = tmp_path / "runs" / "a" / "scores.json"
    found = json.loads(path.read_text())
    moved = found["tuned"]["drift"], found["tuned"]["prior_features"]
    assert moved == pytest.approx((0, 0), abs=1e-3), "a rate of 0 leaves the base as it was"
    assert found["base"]["subject"] != found["tuned"]["subject"], "asked without and with the rare word"
    table = csv.DictReader((tmp_path / "runs" / "evaluation" / "toyworld.csv").read_text().splitlines())
    assert [row["run"] for row in table] == ["a: base model", "a", "b: base model", "b"]
    before = path.stat().st_mtime_ns
    assert command("toyworld", tmp_path / "runs" / "a", *few) == 0
    assert path.stat().st_mtime_ns == before, "nothing is judged twice"


def test_wrong_input_is_one_line(runs, encoders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_text("a mug in the snow\n")
    rest = (f"--prompts={runs / 'prompts.txt'}", "--class_word=mug")
    cases = {
        ("dreambooth", tmp_path / "nowhere"): "no such folder",
        ("dreambooth", tmp_path / "empty"): "holds no training run",
        ("dreambooth", runs / "runs", "--class_word=teapot"): "--class_word=teapot",
        ("dreambooth", runs / "runs", "--class_word=mug", "--dino=a/b"): "--dino=a/b",
        ("dreambooth", runs / "runs", "--class_word=mug", "--dino=none", "--clip=none"): "nothing is left",
        ("dreambooth", runs / "runs", f"--prompts={tmp_path / 'bad.txt'}", "--class_word=mug"): "line 1",
        ("dreambooth", runs / "runs", f"--instance_data_dir={tmp_path / 'empty'}"): "holds no image",
        ("dreambooth", runs / "runs", "--batch_size=0"): "--batch_size",
        ("toyworld", runs / "runs" / "one"): "not an embedded subject",
        ("toyworld", tmp_path / "empty"): "holds no training run",
        ("toyworld",): "runs: needed, the --output_dir of a run",
        ("pictures", f"--generated={tmp_path / 'empty'}", f"--real={runs / 'photos'}", *rest): "--generated=",
        ("pictures", f"--generated={runs / 'photos'}", f"--real={tmp_path / 'empty'}", *rest): "--real=",
    }
    for arguments, words in cases.items():
        assert command(*arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()
        said = [line for line in error if line.startswith("error: ")]
        assert len(said) == 1 and words in said[0], (arguments, error)
