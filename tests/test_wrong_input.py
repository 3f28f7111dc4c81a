"""Wrong input through the real command line: exit code 2, a few lines with flag, value, remedy; nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import numpy as np
import pytest
import torch
from conftest import draw_photo
from PIL import Image
from safetensors.torch import load_file, save_file
from training import flags, run

from finetuning.errors import InputError, RunError
from finetuning.training.optimizer import make_optimizer


class Case:
    """A folder with photos and a class folder, flags that work, and what a case does to them."""

    def __init__(self, folder: Path, base: Path):
        self.folder, self.base = folder, base
        self.photos, self.output, self.classes = folder / "photos", folder / "output", folder / "class"
        self.photos.mkdir()
        for i in range(2):
            draw_photo(i).save(self.photos / f"{i}.png")

    def copy_of_base(self) -> Path:
        return Path(shutil.copytree(self.base, self.folder / "base"))

    def prior(self, *more: str) -> list[str]:
        return ["--with_prior_preservation", f"--class_data_dir={self.classes}", "--class_prompt=a mug", *more]

    def everything(self) -> dict[str, int]:
        return {str(p): p.lstat().st_mtime_ns for p in self.folder.rglob("*")}


def photo(name: str, content: bytes | Image.Image | None):
    """A case whose folder holds one more photo."""

    def change(case: Case):
        path = case.photos / name
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content if content is not None else (case.photos / "0.png").read_bytes()[:80])

    return change


def claiming(side: int) -> bytes:
    """The beginning of a PNG that says how large it is, and ends."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def base(change):
    """A case on a changed copy of the base model."""

    def make(case: Case):
        folder = case.copy_of_base()
        change(folder)
        return [f"--pretrained_model_name_or_path={folder}"]

    return make


def without_a_weight(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if "layer_norm" in name)]
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(path: str, **values):
    def change(folder: Path):
        file = folder / path
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def written(name: str, content: str, *arguments: str):
    """A case with a text file; {} in the arguments is its path."""

    def make(case: Case):
        file = case.folder / name
        file.write_text(content)
        return [a.format(file) for a in arguments]

    return make


def captioned(line: str):
    return lambda case: (case.photos / "metadata.jsonl").write_text(line) and None


def held_out(case: Case, caption: str) -> Path:
    folder = Path(shutil.copytree(case.photos, case.folder / "held"))
    (folder / "0.txt").write_text(caption)
    return folder


def class_folder(*files: tuple[str, bytes | str], more: tuple[str, ...] = ()):
    def make(case: Case):
        case.classes.mkdir()
        for name, content in files:
            if name.endswith((".png", ".jpg")) and not content:
                draw_photo(5).save(case.classes / name)
            else:
                (case.classes / name).write_text(content)
        return case.prior(*more)

    return make


# name: (what is done, or flags; words that the error must hold)
CASES = {
    # The command line
    "unknown flag": (["--instance_dat_dir=x"], ["--instance_dat_dir", "did you mean instance_data_dir"]),
    "stray word": (["mug"], ["'mug'", "quoted"]),
    "no value": (["--seed"], ["--seed"]),
    "an abbreviated flag": (["--max_train=3"], ["unknown flag --max_train"]),
    "not a number": (["--learning_rate=fast"], ["--learning_rate=fast", "number"]),
    "not a whole number": (["--max_train_steps=1.5"], ["--max_train_steps=1.5", "whole"]),
    "not finite": (["--learning_rate=nan"], ["--learning_rate=nan"]),
    "negative seed": (["--seed=-1"], ["--seed=-1", "0 or more"]),
    "zero steps": (["--max_train_steps=0"], ["--max_train_steps=0", "1 or more"]),
    "zero batch": (["--train_batch_size=0"], ["--train_batch_size=0"]),
    "zero accumulation": (["--gradient_accumulation_steps=0"], ["--gradient_accumulation_steps=0"]),
    "negative learning rate": (["--learning_rate=-1"], ["--learning_rate=-1"]),
    "zero gradient norm": (["--max_grad_norm=0"], ["--max_grad_norm=0", "greater than 0"]),
    "zero resolution": (["--resolution=0"], ["--resolution=0"]),
    "a resolution beyond all memory": (["--resolution=80000"], ["--resolution=80000", "8192 or less"]),
    "odd resolution": (["--resolution=20"], ["--resolution=20", "multiple of 8", "16 or 24"]),
    "negative workers": (["--dataloader_num_workers=-1"], ["--dataloader_num_workers=-1"]),
    "dropout of one": (["--boft_dropout=1"], ["--boft_dropout=1"]),
    "zero checkpointing": (["--checkpointing_steps=0"], ["--checkpointing_steps=0"]),
    "zero limit": (["--checkpoints_total_limit=0"], ["--checkpoints_total_limit=0"]),
    "zero validation images": (["--num_validation_images=0"], ["--num_validation_images=0"]),
    "zero inference steps": (["--num_inference_steps=0"], ["--num_inference_steps=0"]),
    "negative guidance": (["--guidance_scale=-1"], ["--guidance_scale=-1"]),
    "unknown scheduler": (["--lr_scheduler=cosin"], ["--lr_scheduler=cosin", "did you mean cosine?"]),
    "unknown precision": (["--mixed_precision=fp8"], ["--mixed_precision=fp8", "bf16"]),
    "unknown tracker": (["--report_to=comet"], ["--report_to=comet", "wandb"]),
    "unknown bias": (["--boft_bias=some"], ["--boft_bias=some", "boft_only"]),
    "unknown prior target": (["--prior_target=x"], ["--prior_target=x", "frozen_model"]),
    "hub offline": (["--push_to_hub"], ["--push_to_hub", "HF_HUB_OFFLINE"]),
    # Contradictions
    "two adapters": (["--use_lora"], ["--use_boft and --use_lora", "choose one"]),
    "lora's flag for boft": (["--rank=4"], ["--rank=4", "--use_lora"]),
    "boft's flag without it": (["--no_use_boft"], ["--boft_block_size=4", "--use_boft"]),
    "block size and number": (["--boft_block_num=2"], ["--boft_block_size=4 and --boft_block_num=2"]),
    "prior flags without prior": (["--class_prompt=a mug"], ["--class_prompt=a mug", "--with_prior_preservation"]),
    "prior without prompt": (["--with_prior_preservation"], ["--class_prompt", "--class_data_dir"]),
    "prior images for the frozen model": (
        lambda case: case.prior("--prior_target=frozen_model"), ["--class_data_dir", "drop one"],
    ),
    "warm-up of a constant": (["--lr_warmup_steps=2"], ["--lr_warmup_steps=2", "constant_with_warmup"]),
    "warm-up longer than the run": (
        ["--lr_warmup_steps=9", "--lr_scheduler=linear"], ["--lr_warmup_steps=9", "--max_train_steps=4"],
    ),
    "warm-up longer than the epochs": (
        ["--max_train_steps=None", "--lr_warmup_steps=9", "--lr_scheduler=linear"],
        ["--lr_warmup_steps=9", "the run's 1 optimizer steps"],
    ),
    "text cached and trained": (
        ["--pre_compute_text_embeddings", "--train_text_encoder"], ["--pre_compute_text_embeddings", "drop one"],
    ),
    "unequal prompts": (
        ["--validation_prompt=a mug", "--base_prompt", "a", "b"], ["--base_prompt", "2 prompts for 1"],
    ),
    "zero SNR for epsilon": (
        base(edit_json("scheduler/scheduler_config.json", prediction_type="epsilon")), ["--rescale_betas_zero_snr"],
    ),
    # The device
    "fp16 on a CPU": (["--mixed_precision=fp16"], ["--mixed_precision=fp16", "bf16"]),
    "xformers on a CPU": (["--enable_xformers_memory_efficient_attention"], ["--enable_xformers", "drop the flag"]),
    # Layers
    "block size that does not divide": (["--boft_block_size=7"], ["--boft_block_size=7"]),
    "block number that does not divide": (["--boft_block_size=0", "--boft_block_num=5"], ["--boft_block_num=5"]),
    "too many factors": (["--boft_n_butterfly_factor=9"], ["--boft_n_butterfly_factor=9"]),
    "no layer": (["--boft_target_modules=,"], ["--boft_target_modules", "attention"]),
    "no such layer": (["--boft_target_modules=to_x"], ["--boft_target_modules=to_x", "attention"]),
    # Settings from a file
    "no settings file": (["--config=nowhere.yaml"], ["--config=nowhere.yaml"]),
    "settings that are no YAML": (written("c.yaml", "a: [", "--config={}"), ["--config=", "not YAML"]),
    "settings that are a list": (written("c.yaml", "- a", "--config={}"), ["--config=", "name: value"]),
    "an unknown setting": (written("c.yaml", "sed: 1", "--config={}"), ["'sed'", "did you mean seed?"]),
    "a setting of the wrong type": (written("c.yaml", "seed: x", "--config={}"), ["seed: x", "whole number"]),
    "a setting given twice": (written("c.yaml", "seed: 1\nseed: 2", "--config={}"), ["seed", "given twice"]),
    "a settings file that is a folder": (lambda case: [f"--config={case.photos}"], ["--config=", "cannot be read"]),
    # Photos
    "no photo folder": (["--instance_data_dir=nowhere"], ["--instance_data_dir=nowhere", "no such folder"]),
    "a photo for a folder": (
        lambda case: [f"--instance_data_dir={case.photos / '0.png'}"], ["--instance_data_dir", "is a file"],
    ),
    "an empty folder": (
        lambda case: [f"--instance_data_dir={(case.folder / 'empty').mkdir() or case.folder / 'empty'}"],
        ["--instance_data_dir", "holds no image"],
    ),
    "a folder without images": (
        lambda case: [p.rename(p.with_suffix(".data")) for p in list(case.photos.iterdir())] and None,
        ["holds no image", ".png"],
    ),
    "a corrupt photo": (photo("2.png", b"no image"), ["2.png", "replace or remove"]),
    "an empty photo": (photo("2.jpg", b""), ["2.jpg", "not a readable image"]),
    "a truncated photo": (photo("2.png", None), ["2.png", "not a readable image"]),
    "a photo of one pixel": (photo("2.png", Image.new("RGB", (1, 1))), ["2.png", "1×1"]),
    "a narrow photo": (photo("2.png", Image.new("RGB", (400, 3))), ["2.png", "400×3"]),
    "a photo that claims 50000×50000 pixels": (photo("2.png", claiming(50_000)), ["2.png", "not a readable image"]),
    "a link that leads nowhere": (
        lambda case: (case.photos / "2.png").symlink_to("nowhere.png"), ["2.png", "not a readable image"],
    ),
    "a caption that is not UTF-8": (
        lambda case: (case.photos / "0.txt").write_bytes(b"caf\xe9") and None, ["0.txt", "not UTF-8"],
    ),
    "captions that are not UTF-8": (
        lambda case: (case.photos / "metadata.jsonl").write_bytes(b"caf\xe9") and None, ["not UTF-8"],
    ),
    "a caption that is a number": (captioned('{"file_name": "0.png", "text": 5}'), ["line 1", "text"]),
    "no prompt": (["--instance_prompt="], ["--instance_prompt", "needed"]),
    "a prompt of blanks": (["--instance_prompt=  "], ["--instance_prompt", "needed"]),
    "a prompt in Latin-1": (["--instance_prompt=caf\udce9"], ["--instance_prompt=", "UTF-8"]),
    "a long prompt": (["--instance_prompt=" + "a photo of mug " * 9], ["--instance_prompt", "38 tokens", "reads 24"]),
    "a long caption": (
        lambda case: (case.photos / "0.txt").write_text("mug " * 30) and None,
        ["0.txt: a caption of 32 tokens", "reads 24", "shorten", "--long_captions=cut"],
    ),
    "a long caption of a photo that is held out": (
        lambda case: [f"--held_out_data_dir={held_out(case, 'mug ' * 30)}"], ["held/0.txt", "--long_captions=cut"],
    ),
    "a long caption of a class image": (
        class_folder(("mine.png", ""), ("mine.txt", "mug " * 30)), ["class/mine.txt", "--long_captions=cut"],
    ),
    "no file of the prompt": (["--instance_prompt=nowhere.TXT"], ["--instance_prompt=nowhere.TXT", "No such file"]),
    "two prompts for one": (
        written("p.txt", "a qwe mug\na mug\n", "--instance_prompt={}"), ["--instance_prompt", "holds 2 prompts"],
    ),
    "a long validation prompt": (["--validation_prompt", "mug " * 30], ["--validation_prompt", "shorten"]),
    "a long class prompt": (lambda case: case.prior("--class_prompt", "mug " * 30), ["--class_prompt", "shorten"]),
    "captions that are no JSON": (captioned("{"), ["metadata.jsonl", "line 1", "file_name"]),
    "captions without a text": (captioned('{"file_name": "0.png"}'), ["metadata.jsonl", "line 1", "text"]),
    "no file of prompts": (["--validation_prompt=nowhere.txt"], ["--validation_prompt=nowhere.txt"]),
    "an empty file of prompts": (
        written("p.txt", "\n", "--validation_prompt={}"), ["--validation_prompt", "no prompt"],
    ),
    "a blank prompt": (["--validation_prompt", "a mug", " "], ["--validation_prompt", "empty prompt"]),
    "a blank base prompt": (["--validation_prompt=a mug", "--base_prompt= "], ["--base_prompt", "empty prompt"]),
    "unequal prompts from a file": (
        written("p.txt", "a\nb", "--validation_prompt={}", "--base_prompt=a"), ["--base_prompt", "1 prompts for 2"],
    ),
    "caches of random crops": (
        lambda case: [draw_photo(3, (30, 20)).save(case.photos / "2.png"), "--cache_latents"][1:],
        ["--cache_latents", "--center_crop"],
    ),
    # The base model
    "no model folder": (["--pretrained_model_name_or_path=./nowhere"], ["nowhere", "no such folder"]),
    "a file for a model": (
        lambda case: [f"--pretrained_model_name_or_path={case.photos / '0.png'}"], ["is no .safetensors file"],
    ),
    "a folder that is no model": (
        lambda case: [f"--pretrained_model_name_or_path={case.photos}"], ["no model_index.json"],
    ),
    "no UNet": (base(lambda folder: shutil.rmtree(folder / "unet")), ["has no unet", "complete"]),
    "no tokenizer": (base(lambda folder: shutil.rmtree(folder / "tokenizer")), ["has no tokenizer"]),
    "cut weights": (
        base(lambda folder: os.truncate(folder / "unet" / "diffusion_pytorch_model.safetensors", 1000)),
        ["--pretrained_model_name_or_path", "cannot be loaded"],
    ),
    "another kind of model": (
        base(edit_json("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])), ["1.x and 2.x"],
    ),
    "a prediction type that cannot be trained": (
        base(edit_json("scheduler/scheduler_config.json", prediction_type="sample")), ["sample", "epsilon"],
    ),
    "a name that was removed": (
        ["--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5"],
        ["its mirror is stable-diffusion-v1-5/stable-diffusion-v1-5"],
    ),
    "a hub name without a network": (
        ["--pretrained_model_name_or_path=somebody/some-model"], ["somebody/some-model", "network", "local folder"],
    ),
    "no tokenizer folder": (["--tokenizer_name=nowhere"], ["--tokenizer_name=nowhere"]),
    "a tokenizer's folder without one": (
        lambda case: [f"--tokenizer_name={case.photos}"], ["--tokenizer_name", "no tokenizer of this"],
    ),
    "a damaged index": (
        base(lambda folder: (folder / "model_index.json").write_text("{")),
        ["--pretrained_model_name_or_path", "cannot be loaded"],
    ),
    "an index that names no scheduler": (
        base(edit_json("model_index.json", scheduler=["diffusers", "NoScheduler"])), ["NoScheduler"],
    ),
    "a text encoder that lacks weights": (base(without_a_weight), ["text encoder lack", "layer_norm"]),
    "a revision of a folder": (["--revision=main"], ["--revision=main", "drop the flag"]),
    "a scheduler without its settings": (
        base(lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink()), ["cannot be loaded"],
    ),
    "too many denoising steps": (["--num_inference_steps=1001"], ["--num_inference_steps=1001", "has 1000"]),
    "a resolution that cannot be halved": (
        lambda case: ["--resolution=24", "--pretrained_model_name_or_path=SD15"],
        ["--resolution=24", "multiple of 64"],
    ),
    # Class images
    "class images among the photos": (
        lambda case: case.prior(f"--class_data_dir={case.photos}/."), ["--class_data_dir", "--instance_data_dir too"],
    ),
    "a file for the class folder": (
        lambda case: case.prior(f"--class_data_dir={case.photos / '0.png'}"), ["--class_data_dir", "is a file"],
    ),
    "class images without a record": (class_folder(("class-00000.png", "")), ["record.json is missing"]),
    "a record of another kind": (class_folder(("class-00000.png", ""), ("record.json", "[]")), ["is damaged"]),
    "a damaged record": (class_folder(("class-00000.png", ""), ("record.json", "{")), ["record.json is damaged"]),
    "class images made otherwise": (
        class_folder(("class-00000.png", ""), ("record.json", '{"prompts": ["a cat"]}')), ["prompts was", "a cat"],
    ),
    "a corrupt class image": (class_folder(("mine.jpg", "x"), ("mine.png", "x")), ["mine.jpg"]),
    "own class images of several prompts": (
        class_folder(("mine.png", ""), more=("--class_prompt", "a", "b")), ["mine.png has no caption", "2 prompts"],
    ),
    # Output and checkpoints
    "a name that is too long": ([f"--output_dir=data/{'x' * 300}"], ["xxx", "name another place"]),
    "an output folder without a name": (["--output_dir="], ["--output_dir=: is empty"]),
    "output among the photos": (lambda case: [f"--output_dir={case.photos}"], ["is --instance_data_dir too"]),
    "a file for the output folder": (
        lambda case: [f"--output_dir={case.photos / '0.png'}"], ["--output_dir", "is a file"],
    ),
    "an output folder below a file": (
        lambda case: [f"--output_dir={case.photos / '0.png' / 'x'}"], ["--output_dir", "is a file"],
    ),
    "no such checkpoint": (["--resume_from_checkpoint=checkpoint-9"], ["checkpoint-9", "there are: none"]),
    "a checkpoint folder that is not there": (["--resume_from_checkpoint=a/checkpoint-9"], ["a/checkpoint-9"]),
    "a checkpoint that is none": (
        lambda case: [f"--resume_from_checkpoint={case.photos}"], ["--resume_from_checkpoint", "incomplete"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name, toy_base, sd15_base, tmp_path, capsys):
    change, words = CASES[name]
    case = Case(tmp_path, toy_base)
    more = change if isinstance(change, list) else (change(case) or [])
    more = [argument.replace("=SD15", f"={sd15_base}") for argument in more]
    if name == "zero SNR for epsilon":
        more.append("--rescale_betas_zero_snr")
    before = case.everything()
    capsys.readouterr()
    assert run(*flags(case.base, case.photos, case.output), *more) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert 1 <= len(lines) <= 3 and "Traceback" not in error, error
    for word in words:
        assert word in error, error
    assert case.everything() == before, "nothing is written"


def test_there_are_enough_cases():
    assert len(CASES) >= 60


def test_folders_without_permission(toy_base, tmp_path):
    """As a user who is not root, who may write everywhere."""
    case = Case(tmp_path, toy_base)
    (case.folder / "locked").mkdir(mode=0o500)
    cases = {
        "no permission to write": [f"--output_dir={case.folder / 'locked' / 'run'}"],
        "no permission; change": [f"--output_dir=/tmp/{case.folder.name}"],  # to read the base
    }
    errors = case.folder / "errors"
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT)
    if (child := os.fork()) == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        with open(handle, "w", buffering=1) as sys.stderr:
            codes = [run(*flags(case.base, case.photos, case.output), *more) for more in cases.values()]
        os._exit(0 if codes == [2, 2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lines = errors.read_text().splitlines()
    assert len(lines) == 2 and all(words in line for words, line in zip(cases, lines)), lines


def test_8_bit_adam_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"--use_8bit_adam.*pip install bitsandbytes"):
        make_optimizer([], betas=(0.9, 0.999), epsilon=1e-8, eight_bit=True)


def test_a_tracker_that_is_not_installed(toy_base, tmp_path, capsys, monkeypatch):
    case = Case(tmp_path, toy_base)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(*flags(case.base, case.photos, case.output), "--report_to=wandb") == 2
    assert "pip install wandb" in capsys.readouterr().err


def test_a_huge_photo_is_named(toy_base, tmp_path, capsys, monkeypatch):
    case = Case(tmp_path, toy_base)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert run(*flags(case.base, case.photos, case.output)) == 2
    assert "0.png" in capsys.readouterr().err


def test_a_run_error_is_one_line_and_exit_code_1(capsys):
    from finetuning.settings.reading import run_command

    def fail(argv):
        raise RunError("the disk is full")

    assert run_command(fail, []) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_memory_that_runs_out_is_one_line_and_other_errors_are_shown(capsys):
    from finetuning.settings.reading import run_command

    def raising(error):
        def fail(argv):
            raise error

        return fail

    cuda, cpu = "CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory: you tried"
    for error in (RuntimeError(cuda), RuntimeError(cpu), MemoryError()):
        assert run_command(raising(error), []) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: out of memory: {error}") and "--train_batch_size" in message
    with pytest.raises(RuntimeError, match="another"):
        run_command(raising(RuntimeError("another")), [])


def test_a_run_that_diverges_stops_before_its_weights_are_spoilt(toy_base, tmp_path, capsys):
    case = Case(tmp_path, toy_base)
    more = ["--learning_rate=1e30", "--checkpointing_steps=1"]
    assert run(*flags(case.base, case.photos, case.output, *more)) == 1
    error = capsys.readouterr().err
    assert "has diverged" in error and "--learning_rate" in error and "Traceback" not in error
    for path in case.output.glob("checkpoint-*/unet/*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "I;16", "L", "P"])
def test_photos_of_other_modes_are_no_fault(mode, toy_base, tmp_path):
    case = Case(tmp_path, toy_base)
    if mode == "I;16":
        Image.fromarray(np.full((24, 24), 40000, dtype=np.uint16)).save(case.photos / "2.png")
    else:
        draw_photo(2).convert(mode).save(case.photos / ("2.jpg" if mode == "CMYK" else "2.png"))
    assert run(*flags(case.base, case.photos, case.output, "--max_train_steps=1")) == 0
