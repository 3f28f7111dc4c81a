"""Flags, YAML, and their faults."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from finetuning.errors import InputError
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.fields import Config, Group, contradictions, fields_in, fields_of, setting
from finetuning.settings.reading import RECIPES, read_config, recipe_paths, run_command, split_at_dashes

TRAINERS = (DreamBoothConfig, ControlNetConfig)
NEEDED = ["--instance_data_dir=photos", "--instance_prompt=a photo of qwe mug"]


def read(*argv: str) -> DreamBoothConfig:
    return read_config(DreamBoothConfig, [*NEEDED, *argv])


def test_flags_have_the_types_of_their_fields():
    config = read("--learning_rate=3e-5", "--max_train_steps", "7", "--use_boft", "--validation_prompt", "a. b", "c")
    assert config.optimization.learning_rate == 3e-5
    assert config.optimization.max_train_steps == 7
    assert config.adapter.use_boft
    assert config.validation.validation_prompt == ["a. b", "c"]


def test_the_original_command_is_understood():
    config = read(
        "--wandb_project_name=p", "--wandb_run_name=r", "--with_prior_preservation", "--prior_loss_weight=1.0",
        "--class_data_dir=c", "--class_prompt=a photo of backpack", "--resolution=512", "--num_dataloader_workers=2",
        "--lr_scheduler=constant", "--lr_warmup_steps=0", "--num_class_images=200", "--use_boft", "--boft_block_num=8",
        "--boft_block_size=0", "--boft_n_butterfly_factor=1", "--boft_dropout=0.1", "--boft_bias=boft_only",
        "--enable_xformers_memory_efficient_attention", "--report_to=wandb",
    )  # fmt: skip
    assert config.data.dataloader_num_workers == 2
    assert config.tracking.tracker_project_name == "p"


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 5\nlearning_rate: 1\nuse_lora: true\nrank: 2\n")
    config = read(f"--config={file}", "--seed=7", "--no_use_lora", "--rank=8")
    assert config.optimization.seed == 7
    assert config.optimization.learning_rate == 1.0 and isinstance(config.optimization.learning_rate, float)
    assert not config.adapter.use_lora
    assert config.optimization.train_batch_size == 4


def test_what_is_saved_reads_back_equal_and_holds_no_secret(tmp_path):
    config = read("--validation_prompt", "ä. 1", "b: c", "--max_train_steps=3")
    config = config.with_values(push_to_hub=True, hub_token="secret-token", resolution=64)
    config.save(tmp_path / "c.yaml")
    text = (tmp_path / "c.yaml").read_text()
    assert "secret-token" not in text and "hub_token" not in text and "hub_token" not in config.as_dict()
    again = read_config(DreamBoothConfig, [f"--config={tmp_path / 'c.yaml'}"])
    absolute = {"instance_data_dir": str(Path("photos").absolute())}
    assert again.as_dict() == {**config.as_dict(), **absolute}


def test_the_saved_file_means_the_same_in_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = read("--pretrained_model_name_or_path=owner/base", "--tokenizer_name=owner/name-on-the-hub")
    config.save(Path("c.yaml"))
    saved = yaml.safe_load(Path("c.yaml").read_text())
    assert saved["pretrained_model_name_or_path"] == str(tmp_path / "owner" / "base")
    assert saved["instance_data_dir"] == str(tmp_path / "photos")
    assert saved["tokenizer_name"] == "owner/name-on-the-hub" and saved["class_data_dir"] is None


def test_all_faults_come_in_one_error():
    with pytest.raises(InputError) as caught:
        read("--learning_rat=1", "--max_train_steps=x", "--resolution=1.5")
    text = str(caught.value)
    assert "did you mean learning_rate?" in text
    assert "--max_train_steps=x: expected a whole number or None" in text
    assert "--resolution=1.5" in text
    assert len(caught.value.faults) == 3


def test_combinations_are_checked_together():
    with pytest.raises(InputError) as caught:
        read("--use_boft", "--use_lora", "--class_data_dir=x", "--lr_warmup_steps=5")
    assert {f.split(":")[0].split("=")[0].split(" ")[0] for f in caught.value.faults} == {
        "--use_boft", "--class_data_dir", "--lr_warmup_steps",
    }  # fmt: skip


def test_every_setting_is_documented_and_unique():
    config = read()
    names = [field.name for _, field in fields_of(config)]
    assert len(names) == len(set(names))
    assert all(len(field.metadata["help"]) > 3 for _, field in fields_of(config))
    assert all(type(group).__doc__ for group in (getattr(config, f.name) for f in fields(config)))


def test_the_file_may_not_have_unknown_keys_or_wrong_types(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"sed": 1, "use_boft": "yes", "seed": 1.5}))
    with pytest.raises(InputError) as caught:
        read(f"--config={file}")
    text = str(caught.value)
    assert "unknown key 'sed'; did you mean seed?" in text and "use_boft: yes" in text and "seed: 1.5" in text


def test_contradictions_name_both_values():
    before = read("--learning_rate=1e-3", "--output_dir=a").as_dict()
    now = read("--learning_rate=2e-3", "--output_dir=b")
    assert contradictions(before, now) == ["--learning_rate=0.002: the checkpoint was made with 0.001"]


@dataclass
class _Numbers(Group):
    """Numbers"""

    n: int = setting(1, "a number", minimum=0, maximum=3)
    maybe: float | None = setting(None, "perhaps a number", above=0)


@dataclass
class _Config(Config):
    numbers: _Numbers


@dataclass
class _Files(Group):
    """Files"""

    folder: str = setting(None, "The folder of a run.", positional=True, required=True)
    names: list[str] = setting([], "Names to look for.", positional=True)


@dataclass
class _Search(Config):
    """Search a folder.

    By names.
    """

    files: _Files
    numbers: _Numbers


@dataclass
class _Count(Config):
    """Count to a number."""

    numbers: _Numbers


COMMANDS = {"search": _Search, "count": _Count}


def test_some_values_are_typed_without_a_flag(tmp_path):
    config = read_config(_Search, ["runs", "a", "b", "--n=3"])
    assert (config.files.folder, config.files.names, config.numbers.n) == ("runs", ["a", "b"], 3)
    assert read_config(_Search, ["--n=3", "runs"]).files.names == []
    (tmp_path / "search.yaml").write_text("folder: runs\nnames: [c]\n")
    assert read_config(_Search, [f"--config={tmp_path / 'search.yaml'}"]).files == _Files("runs", ["c"])
    for arguments, message in (
        ([], "folder: needed, the folder of a run"),
        ([" "], "folder= : is empty"),
        (["runs", "--mayb=1"], "unknown flag --mayb; did you mean maybe?"),
        (["--n=1", "runs", "--n=2", "a"], "unexpected argument 'a'"),
    ):
        with pytest.raises(InputError) as caught:
            read_config(_Search, arguments)
        assert str(caught.value).startswith(message), arguments


def test_subcommands_have_settings_of_their_own(capsys):
    assert read_config(COMMANDS, ["search", "runs", "a"]).files.names == ["a"]
    assert isinstance(read_config(COMMANDS, ["count", "--n=2"]), _Count)
    for arguments, message in (
        (["serach", "runs"], "serach: no such command; did you mean search?; give one of search, count first"),
        ([], "a command is needed; give one of search, count first"),
        (["count", "runs"], "unexpected argument 'runs'"),
    ):
        with pytest.raises(InputError) as caught:
            read_config(COMMANDS, arguments)
        assert str(caught.value).startswith(message), arguments
    for arguments in (["--help"], ["search", "--help"]):
        with pytest.raises(SystemExit) as ended:
            read_config(COMMANDS, arguments, "Find things.")
        assert ended.value.code == 0
    whole, own = capsys.readouterr().out.split("usage: ")[1:]
    assert "Find things." in whole and "search  Search a folder.\n  count   Count to a number.\n" in whole
    assert own.split("\n")[0].endswith(" search FOLDER NAMES [--config run.yaml] [--flag=value …]")
    assert "By names." in own and "The folder of a run. (needed)" in own and "--n INT" in own


def test_what_follows_two_dashes_is_for_another_program():
    assert split_at_dashes(["--n=1", "--", "--m=2", "--", "x"]) == (["--n=1"], ["--m=2", "--", "x"])
    assert split_at_dashes(["--n=1"]) == (["--n=1"], [])


def help_of(config: type[Config], flag: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        read_config(config, [flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", TRAINERS)
def test_help_shows_the_common_flags_and_where_the_others_are(config, capsys):
    common = [field.name for field in fields_in(config) if field.metadata["common"]]
    first, whole = help_of(config, "--help", capsys), help_of(config, "--help-all", capsys)
    assert re.findall(r"^  --(\w+)(?= )", first, re.M)[0:2] == ["recipe", "config"]
    for field in fields_in(config):
        is_there = re.search(rf"^  --{field.name}\b", first, re.M) is not None
        assert is_there == (field.name in common) and f"  --{field.name}" in whole, field.name
    assert 15 <= len(common) <= 27
    assert "--help-all` shows the rest" in first.splitlines()[-1] and "shows the rest" not in whole
    assert "--help-all" not in help_of(_Count, "--help", capsys), "a program whose flags are few shows all of them"


@pytest.mark.parametrize("config", TRAINERS)
def test_recipes_override_defaults_and_are_overridden_by_files_and_flags(config, tmp_path):
    needed = NEEDED if config is DreamBoothConfig else []
    name = next(name for name in recipe_paths(config) if name.endswith("-embedded"))
    recipe = yaml.safe_load(recipe_paths(config)[name].read_text())
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.5\nboft_n_butterfly_factor: 1\n")
    flags = [f"--recipe={name}", "--max_train_steps=99", "--boft_n_butterfly_factor=3"]
    if config is DreamBoothConfig:
        flags += ["--class_prompt=a mug", "--class_data_dir=classes"]
    now = read_config(config, [*flags, *needed, f"--config={tmp_path / 'mine.yaml'}"]).as_dict()
    overridden = {"learning_rate": 0.5, "max_train_steps": 99, "boft_n_butterfly_factor": 3}
    assert {key: now[key] for key in recipe} == {**recipe, **overridden}


@pytest.mark.parametrize("config", TRAINERS)
def test_every_recipe_passes_the_checks_of_its_trainer(config):
    """A recipe says how to train; on what is said by flags."""
    trainer = "dreambooth" if config is DreamBoothConfig else "controlnet"
    assert set(recipe_paths(config)) == {path.stem for path in RECIPES.glob(f"{trainer}*.yaml")} != set()
    given = [*NEEDED, "--class_prompt=a mug", "--class_data_dir=classes"] if trainer == "dreambooth" else []
    for name, path in recipe_paths(config).items():
        recipe = yaml.safe_load(path.read_text())
        now = read_config(config, [f"--recipe={name}", *given]).as_dict()
        assert {key: now[key] for key in recipe} == recipe, name


def test_every_file_of_recipes_belongs_to_a_trainer():
    assert {path for config in TRAINERS for path in recipe_paths(config).values()} == set(RECIPES.iterdir())


def test_an_unknown_recipe_is_told_which_there_are():
    for name in ("dreambooth-embeded", "controlnet", "../recipes/dreambooth"):
        with pytest.raises(InputError, match=f"--recipe={name}: no such recipe; there are: dreambooth-embedded, dre"):
            read(f"--recipe={name}")
    with pytest.raises(InputError, match="unknown flag --recipe"):
        read_config(_Count, ["--recipe=x"])


@pytest.mark.parametrize("argument", ["--n=-1", "--n=4", "--n=nan", "--n=", "--maybe=0", "--maybe=inf", "--n"])
def test_ranges(argument):
    with pytest.raises(InputError, match=argument.split("=")[0]):
        read_config(_Config, [argument])


def test_exit_codes(capsys):
    def fail(argv):
        raise InputError("--x=1: wrong", "--y=2: wrong too")

    assert run_command(lambda argv: None, []) == 0
    assert run_command(fail, []) == 2
    assert capsys.readouterr().err == "error: --x=1: wrong\nerror: --y=2: wrong too\n"
    assert run_command(fail, ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err

    def interrupt(argv):
        raise KeyboardInterrupt

    assert run_command(interrupt, []) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_the_block_size_that_is_used_is_the_one_that_is_recorded():
    """8 if neither size nor number is given; the number alone leaves it open."""
    sizes = {flags: read("--use_boft", *flags).adapter.boft_block_size for flags in (
        (), ("--boft_block_size=0",), ("--boft_block_size=4",), ("--boft_block_num=2",),
    )}  # fmt: skip
    assert list(sizes.values()) == [8, 8, 4, None]
    assert read("--use_lora").adapter.boft_block_size is None and read().as_dict()["boft_block_size"] is None
