"""Putting a result on the hub: the real library against a server on this machine that answers as the hub does."""

from __future__ import annotations

import base64
import json
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
import yaml
from conftest import draw_photo
from control_training import control_flags, control_folder, run_control
from huggingface_hub import constants
from test_inference import MAKERS, answer, write_run
from training import flags
from training import run as train

from finetuning.adapters.pipelines import load_adapter, load_base, load_run
from finetuning.control.card import control_card
from finetuning.publishing.hub import open_repository, permission_fault, uploaded_files
from finetuning.publishing.model_card import card_for_hub, licence_of, model_card
from finetuning.settings.reading import run_command
from scripts import push

TOKEN = "hf_SecretOfTheTest"
USER = {"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]}


class Hub(ThreadingHTTPServer):
    """What the library asks while it uploads. `refuses` holds the beginnings of paths that it answers with 403."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        self.refuses: tuple[str, ...] = ()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0].removeprefix("/api")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials"})
        if path.startswith(self.server.refuses or ("-",)):
            return self.send(403, {"error": "Forbidden: you have no write access here"})
        if path == "/whoami-v2":
            return self.send(200, USER)
        if path == "/repos/create":
            wanted = json.loads(body)
            return self.send(200, {"url": f"{self.server.url}/{wanted.get('organization') or 'me'}/{wanted['name']}"})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            said = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.send(200, {"files": said})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.send(200, {"commitUrl": f"{self.server.url}/me/mug/commit/1", "commitOid": "1"})
        return self.send(200, {"errors": [], "warnings": [], "sha": "0" * 40})

    def send(self, code: int, content: dict):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # what the environment's HF_HUB_OFFLINE and
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # HF_ENDPOINT set when the library is imported
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def finished(toy_base, tmp_path_factory) -> Path:
    """What a run leaves, and much beside it."""
    run = write_run(tmp_path_factory.mktemp("hub") / "mug", toy_base, MAKERS["boft"])
    card = model_card(
        title="a photo of qwe mug", base=str(toy_base), kind="boft", folder=str(run), prompt="a photo of qwe mug",
        facts={"steps": 4}, picture="comparison.png", prompts=["a qwe mug in the snow"], stock_peft=False,
    )  # fmt: skip
    (run / "README.md").write_text(card)
    (run / "scores.json").write_text(json.dumps({"subject": "mug", "base": {"leak": 0.1}, "tuned": {"leak": 0.25}}))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    draw_photo(0).save(run / "comparison.png")
    for name in ("validation/validation-000002.png", "checkpoint-2/unet/w.safetensors", "logs/x", "wandb/y.json",
                 "photos/me.png", "evaluation/made/1.png", ".unfinished.json", "unet/.unfinished"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"content")
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "mug"))


def script(*arguments: object) -> int:
    return run_command(push.main, [str(argument) for argument in arguments])


def holding(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_result_goes_up_with_its_card_and_nothing_else(hub, run, toy_base, capsys):
    assert script("--run", run, "--hub_token", TOKEN) == 0
    assert capsys.readouterr().out == f"10 files in {hub.url}/me/mug\n"
    assert set(hub.files) == {
        "README.md", "config.yaml", "metrics.jsonl", "scores.json", "comparison.png",
        "validation/validation-000002.png", "unet/adapter_config.json", "unet/adapter_model.safetensors",
        "text_encoder/adapter_config.json", "text_encoder/adapter_model.safetensors",
    }  # fmt: skip
    changed = {name for name, content in hub.files.items() if content != (run / name).read_bytes()}
    assert changed == {"README.md", "config.yaml", "text_encoder/adapter_config.json"}, "where the base's path stands"
    assert json.loads(hub.files["text_encoder/adapter_config.json"])["base_model_name_or_path"] == toy_base.name
    assert yaml.safe_load(hub.files["config.yaml"]) == {"pretrained_model_name_or_path": toy_base.name}
    assert yaml.safe_load((run / "config.yaml").read_text()) == {"pretrained_model_name_or_path": str(toy_base)}
    front, card = hub.files["README.md"].decode().split("---\n")[1:]
    assert yaml.safe_load(front)["tags"][-1] == "boft" and "base_model" not in yaml.safe_load(front)
    assert 'run = "me/mug"' in card and str(run) not in card
    assert "* a qwe mug in the snow" in card and "![a photo of qwe mug](comparison.png)" in card
    assert "| tuned | 0.250 |" in card and card.count("## Scores") == 1 and "| steps | 4 |" in card
    assert not holding(run, TOKEN) and TOKEN not in repr(open_repository("me/mug", TOKEN, run))

    scores = {"base": {"leak": 0.1}, "tuned": {"leak": 0.5}}  # once more, with other scores
    (run / "scores.json").write_text(json.dumps(scores))
    assert script("--run", run, "--hub_token", TOKEN, "--hub_model_id", "lab/mug-2") == 0
    card = hub.files["README.md"].decode()
    assert 'run = "lab/mug-2"' in card and "0.500" in card and "0.250" not in card and card.count("## Scores") == 1


def test_what_was_uploaded_is_loaded_by_its_name(hub, run, toy_base, tmp_path, monkeypatch):
    monkeypatch.chdir(toy_base.parent)  # from which the uploaded config.yaml names the base
    assert script("--run", run, "--hub_token", TOKEN) == 0
    cache, commit = tmp_path / "cache" / "models--me--mug", "0" * 40  # as the library leaves it after a download
    for name, content in {f"snapshots/{commit}/{n}": c for n, c in hub.files.items()}.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(content)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    pipeline = load_base(str(toy_base))
    assert load_adapter(pipeline, "me/mug") == "mug"
    assert torch.equal(answer(pipeline), answer(load_run(run)))


def test_training_uploads_at_its_end_and_keeps_the_token_to_itself(
    hub, toy_base, photos, tmp_path, monkeypatch, capfd
):
    """A full fine-tune, in whose files diffusers notes where the base lies. No path of this machine goes up."""
    output, told = tmp_path / "runs" / "qwe-mug", ("--push_to_hub", f"--hub_token={TOKEN}")
    more = ("--validation_prompt=a red mug", "--max_train_steps=1", "--report_to=all", *told)
    monkeypatch.setattr(sys, "argv", ["train_dreambooth.py", *more])  # which trackers like to keep
    monkeypatch.chdir(tmp_path)
    assert train(*flags(toy_base, photos, output, *more, adapter=())) == 0
    asked = [place for place in hub.asked if place != "/agent-harnesses"]  # which the library asks for once a day
    assert asked[0] == "/whoami-v2" and "/repos/create" in hub.asked and any("auth-check" in a for a in hub.asked)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert {weights, "model_index.json", "README.md", "config.yaml", "comparison.png"} <= set(hub.files)
    assert hub.files[weights] == (output / weights).read_bytes()
    config, told = yaml.safe_load(hub.files["config.yaml"]), yaml.safe_load((output / "config.yaml").read_text())
    places = {
        "instance_data_dir": "photos",
        "output_dir": "runs/qwe-mug",
        "pretrained_model_name_or_path": toy_base.name,
    }
    assert config == {**told, **places} and told["instance_data_dir"] == str(photos)
    assert str(toy_base) in (output / "unet" / "config.json").read_text()
    for path in (tmp_path, toy_base, f"{Path.home()}/"):
        assert not [name for name, content in hub.files.items() if str(path).encode() in content], path
    assert 'run = "me/qwe-mug"' in hub.files["README.md"].decode()
    assert not holding(tmp_path, TOKEN) and (output / "wandb").is_dir()
    said = capfd.readouterr()
    assert f"uploaded: {hub.url}/me/qwe-mug" in said.err and TOKEN not in said.out + said.err


def test_what_is_not_taken_stays_and_says_how_to_go_on(hub, run, capsys):
    hub.refuses = ("/models/me/mug/commit",)
    assert script("--run", run, "--hub_token", TOKEN) == 1
    error = capsys.readouterr().err
    assert "me/mug: not uploaded" in error and f"python scripts/push.py --run {run} --hub_model_id me/mug" in error
    assert error.count("\n") == 1 and (run / "unet" / "adapter_model.safetensors").is_file()


WRONG = {
    "no token": ([], "there is no token; log in with `hf auth login`, set HF_TOKEN, or give --hub_token"),
    "a token that is not accepted": (["--hub_token=hf_other"], "the hub does not accept this token"),
    "another's name": (["--hub_model_id=you/mug", f"--hub_token={TOKEN}"], "owners that fit: me, lab, club"),
    "an organization's reader": (["--hub_model_id=club/mug", f"--hub_token={TOKEN}"], "me may only read in club"),
    "a name that is none": (["--hub_model_id=me/a mug/x", f"--hub_token={TOKEN}"], "is no name of a repository"),
    "a repository of others": (
        ["--hub_model_id=lab/closed", f"--hub_token={TOKEN}"],
        "this token may not write there",
    ),
    "no such run": (["--run=nowhere"], "holds no README.md"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, hub, run, capsys):
    more, message = WRONG[case]
    hub.refuses = ("/models/lab/closed/auth-check/write",)
    assert script("--run", run, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1 and TOKEN not in error
    assert not hub.files


@pytest.mark.parametrize(("is_offline", "message"), [
    (True, "HF_HUB_OFFLINE is set"),
    (False, "http://127.0.0.1:9 cannot be reached"),
])  # fmt: skip
def test_without_a_network_training_does_not_begin(
    is_offline, message, toy_base, photos, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    started = time.perf_counter()
    code = train(*flags(toy_base, photos, tmp_path / "out", "--push_to_hub", f"--hub_token={TOKEN}"))
    error = capfd.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error and TOKEN not in error
    assert not (tmp_path / "out").exists() and time.perf_counter() - started < 15


def test_controls_are_shared_by_the_same_function(hub, toy_base, tmp_path, monkeypatch, capsys):
    card = control_card(base=str(toy_base), folder="runs/edges", control="light", adapter="boft", facts={}, picture="")
    assert 'run = "me/edges"\npipeline = load_control_run(run)' in card_for_hub(card, tmp_path, "me/edges")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    data, output = control_folder(tmp_path / "data", 3), tmp_path / "out"
    assert run_control(*control_flags(toy_base, data, output, "--push_to_hub", f"--hub_token={TOKEN}")) == 2
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err and not output.exists()


def test_flags_of_the_hub_without_it(toy_base, photos, tmp_path, capsys):
    assert train(*flags(toy_base, photos, tmp_path / "out", "--hub_model_id=me/x", f"--hub_token={TOKEN}")) == 2
    error = capsys.readouterr().err
    assert error.count("has no effect without --push_to_hub") == 2 and TOKEN not in error


def test_who_may_write():
    assert permission_fault(USER, "me/x") is None and permission_fault(USER, "lab/x") is None
    reader = {**USER, "auth": {"accessToken": {"role": "read"}}}
    assert "may only read" in permission_fault(reader, "me/x")
    assert permission_fault({**USER, "auth": {"accessToken": {"role": "fineGrained"}}}, "me/x") is None


def test_licence_and_base_of_a_card(tmp_path):
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    card = model_card(title="t", base=name, kind="lora", folder="runs/t", prompt="a qwe mug", facts={})
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "creativeml-openrail-m" and front["base_model"] == name
    assert licence_of(str(Path(__file__).parents[1] / "data" / "toyworld" / "base")) == "apache-2.0"
    card = model_card(title="t", base="who/knows", kind="full", folder="runs/t", prompt="a qwe mug", facts={})
    assert "license" not in yaml.safe_load(card.split("---")[1]) and "terms of the base model" in card
    assert card_for_hub(card, tmp_path, "me/t") == card.replace('"runs/t"', '"me/t"')
    assert uploaded_files(tmp_path) == []
