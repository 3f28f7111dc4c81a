"""The house: which room may import which, how long files and functions may be, and where some words may stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_dreambooth", "train_controlnet", "scripts")
OUTSIDE = {  # package: what it must not import
    "boft": {"diffusers", "accelerate", "finetuning", "toyworld", "tests", *SCRIPTS},
    "toyworld": {"boft", "finetuning", "tests", *SCRIPTS},
    "finetuning": {"toyworld", "tests", *SCRIPTS},
}
# The rooms of finetuning/, top floor first: each may import from those that stand behind it, which are all below it.
GROUND = ("errors", "run_folder", "files", "readings", "randomness", "modes", "quiet_libraries")
ROOMS = {
    "studies": "recipes training adapters pictures run evaluation settings dataset models objective",
    "recipes": "dreambooth settings",
    "dreambooth": "builders training publishing adapters pictures run evaluation settings dataset models",
    "control": "builders training publishing adapters pictures run evaluation settings dataset models",
    "builders": "training publishing adapters pictures run settings models objective",
    "training": "adapters pictures run settings dataset models",
    "export": "adapters",
    "publishing": "run evaluation settings",
    "adapters": "settings models",
    "pictures": "dataset models",
    "run": "settings",
    "evaluation": "dataset",
    "settings": "",
    "dataset": "models",
    "models": "objective",
    "objective": "",
}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_RUN = 400, 60, 5  # lines
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}


def sources(*places: str) -> list[Path]:
    """Python files of packages, and single files, of the repository."""
    found = [ROOT / place for place in places]
    return sorted(
        p for place in found for p in (place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")])
    )


def modules_imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "toyworld" in path.parts, f"{path}: write imports out, so that one sees the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.level == 0}
    return names


def room_of(module: str) -> str:
    """The room of finetuning/ in which a module is: its folder, or the file itself on the ground."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("package", OUTSIDE)
def test_packages_import_one_way(package):
    allowed = {("boft/targets.py", "transformers"), ("boft/linear.py", "transformers")}  # whose Conv1D is adapted
    faults = [
        f"{name} imports {other}"
        for path in sources(package)
        for other in {module.split(".")[0] for module in modules_imported(path)} & OUTSIDE[package]
        if ((name := str(path.relative_to(ROOT))), other) not in allowed
    ]
    assert not faults


def test_only_adapters_and_studies_know_boft():
    importers = {
        path.relative_to(ROOT / "finetuning").parts[0]
        for path in sources("finetuning")
        if any(module.split(".")[0] == "boft" for module in modules_imported(path))
    }
    assert importers == {"adapters", "studies"}  # which measures it


def test_rooms_import_from_rooms_below():
    floors = list(ROOMS)
    for room, others in ROOMS.items():
        assert all(floors.index(other) > floors.index(room) for other in others.split() if other in floors), room
    faults = []
    for path in sources("finetuning"):
        parts = path.relative_to(ROOT / "finetuning").with_suffix("").parts
        room = parts[0]
        for module in modules_imported(path):
            other = room_of(module)
            if not module.startswith("finetuning.") or other == room:
                continue
            ground = GROUND[: GROUND.index(room)] if room in GROUND else GROUND
            if other not in {*ROOMS.get(room, "").split(), *ground}:
                faults.append(f"{'/'.join(parts)} imports {module}")
    assert not faults


def test_contributing_shows_the_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)/?` \|.+\| ?([\w ]*?) ?\|$", text, re.MULTILINE)
    assert shown == list(ROOMS.items())


def test_rooms_say_what_they_are():
    for room in {path.parent for path in sources("finetuning")}:
        text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or "?"
        assert text.splitlines()[0].endswith("."), room


def test_nothing_imports_a_script_but_a_test():
    measuring = {ROOT / "scripts" / name for name in ("kill_test.py", "profile_training.py")}  # which test the trainer
    for path in {*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")} - measuring:
        assert not {module.split(".")[0] for module in modules_imported(path)} & set(SCRIPTS), path


def test_files_and_functions_are_short():
    faults = []
    for path in sources("boft", "finetuning", "toyworld", "scripts", "train_dreambooth", "train_controlnet"):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        if (lines := text.count("\n")) > LONGEST_FILE:
            faults.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                faults.append(f"{name}: {node.name} has {lines} lines")
    assert not faults


def test_the_trainers_have_no_six_lines_in_common():
    first, second = (
        [line.strip() for line in (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines() if line.strip()]
        for name in SCRIPTS[:2]
    )
    first, second = (
        [line for line in lines if not line.startswith(("from ", "import "))] for lines in (first, second)
    )
    n = LONGEST_RUN + 1
    runs = {tuple(second[i : i + n]) for i in range(len(second) - n + 1)}
    assert not [first[i] for i in range(len(first) - n + 1) if tuple(first[i : i + n]) in runs]


# Words that belong in one place: (regular expression, rooms and files of finetuning/ where it may stand)
WORDS = {
    "base models": (r"\b(UNet2DConditionModel|\w+Transformer2DModel|StableDiffusion\w*Pipeline)\b",
                    {"models", "control", "studies", "publishing", "export"}),
    "processes": (r"^\s*(from|import) accelerate\b", {"run"}),
    "flags": (r"^\s*(from|import) argparse\b", {"settings"}),
    "a run's files": (r"[\"'](config\.yaml|metrics\.jsonl|environment\.json|training_state\.pt|scores\.json"
                      r"|(comparison|consistency)\.png|without_control)[\"']|/ [\"'](report\.html|evaluation)[\"']",
                      {"run_folder"}),
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words_stand_in_their_rooms(word):
    pattern, rooms = WORDS[word]
    faults = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources("finetuning", "scripts", "train_dreambooth", "train_controlnet")
        if path.relative_to(ROOT / "finetuning" if "finetuning" in path.parts else ROOT).with_suffix("").parts[0]
        not in rooms
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not faults, "\n".join(faults)


def test_files_are_named_for_what_they_hold():
    assert not {p.stem for p in sources("boft", "finetuning", "toyworld", "scripts")} & VAGUE


TEXT = ("open", "fdopen", "read_text", "write_text")
IN_BYTES = ("Image", "os", "run", "self.run", "lzma")  # whose `open` is another one


def unsaid_encodings(tree: ast.AST) -> list[int]:
    """Lines that read or write text in the encoding of the machine, which is another one on Windows."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        holder, _, verb = name.rpartition(".")
        said = {keyword.arg for keyword in node.keywords}
        mode = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_binary = any("b" in value and set(value) <= set("rwxab+t") for value in mode)
        opens = (
            verb in TEXT
            and (holder or verb == "open")
            and not (verb == "open" and holder in IN_BYTES)
            and not is_binary
        )
        talks = verb in ("run", "Popen") and bool(said & {"text", "universal_newlines"})
        if (opens or talks) and "encoding" not in said:
            lines.append(node.lineno)
    return lines


def test_text_is_read_and_written_in_utf_8():
    assert unsaid_encodings(ast.parse("open('a')\nopen('a', 'rb')\npath.read_text()\nImage.open(x)")) == [1, 3]
    places = (*OUTSIDE, *SCRIPTS)
    found = [f"{path.relative_to(ROOT)}:{line}" for path in sources(*places)
             for line in unsaid_encodings(ast.parse(path.read_text(encoding="utf-8")))]  # fmt: skip
    assert not found
