"""What happens to files of settings, checkpoints and adapters, by seeded random numbers; and how a program may end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from finetuning.settings.reading import run_command

SECONDS = 180  # after which something hangs


def digest(folder: Path) -> str:
    """Of the names and the bytes of all files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)}\n".encode(errors="surrogateescape"))
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


@contextlib.contextmanager
def limited():
    def stop(*_):
        raise AssertionError(f"it takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(main: Callable, argv: list[str], inputs: Path, capsys) -> int:
    """The exit code, 0 or 2, after which all inputs are as before; with 2 goes one message."""
    before = digest(inputs)
    capsys.readouterr()
    with limited():
        code = run_command(main, argv)
    said = capsys.readouterr().err
    assert digest(inputs) == before, "its inputs have changed"
    assert code in (0, 2), said
    if code == 2:
        lines = said.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines) and len(said) < 5000, said[-2000:]
        assert "Traceback" not in said
    return code


# Settings

ODD_VALUES = (
    ".nan", ".inf", "-.inf", "1e400", "1" + "0" * 400, "-1", "0", "0.5", "1e-3", "1_000", "0x10", "017", "12:30:45",
    "~", "null", "yes", "No", "true", "''", '" "', "[]", "{}", "[1, 2]", "[[1], [2]]", "{a: b}", "[~]", "[null, x]",
    "2026-02-30", "2026-02-03", "!!binary aGVsbG8=", "!!set {a, b}", "!!int x", "!!float x", "!!bool x",
    "!!timestamp x", "!!null x", "!!python/object/apply:os.system [ls]", "&a [*a]", "*missing", "\t1", "'\\0'",
    '"\\0"', '"\\uD800"', "é", "“a”", "|\n  a\n  b", ">-\n  a", "? x", "- 1", "!x y", "%d", "@a", "`a`", "a: b: c",
    "#", "[" * 3000, "{a: " * 3000, "\x07", "\x85", "'a", '"a', "10000000000000000000000", "4294967296", "-0", "+1",
    "1.", ".5", "1e5", "inf", "nan", "None", "<<", "a" * 100000,
)  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefghijk", "bcdefghijkl")
)


def odd_file(random: random.Random, good: str) -> bytes:
    """A configuration file that someone has edited, copied, or never meant as one."""
    lines = good.splitlines()
    kind = random.randrange(14)
    if kind < 6:  # an odd value in the place of one or two
        for _ in range(random.choice((1, 1, 2))):
            i = random.randrange(len(lines))
            lines[i] = f"{lines[i].split(':')[0]}: {random.choice(ODD_VALUES)}"
    elif kind == 6:  # a line twice, once more with another value
        line = random.choice(lines)
        lines.append(random.choice((line, f"{line.split(':')[0]}: {random.choice(ODD_VALUES)}")))
    elif kind == 7:  # an unknown or odd key
        key = random.choice(
            ("sed", "1", "~", "[a, b]", "? {a: b}\n", "true", "'config'", "debug", "--seed", ".nan", "é", "<<")
        )
        lines.insert(random.randrange(len(lines)), f"{key}: {random.choice(ODD_VALUES)}")
    elif kind == 8:  # tabs and other whitespace
        i = random.randrange(len(lines))
        lines[i] = (
            random.choice(("\t", "  ", " ", "\xa0", "- ", "---\n", "...\n", "%YAML 9.9\n---\n", "%x\n")) + lines[i]
        )
    elif kind == 9:  # another encoding
        text = "\n".join([*lines, "class_prompt: [a “café”]"])
        return text.encode(random.choice(("utf-8-sig", "utf-16", "utf-16-le", "cp1252", "utf-32", "utf-8")))
    elif kind == 10:  # bytes that have changed
        data = bytearray(good.encode())
        for _ in range(random.choice((1, 3, 20))):
            data[random.randrange(len(data))] = random.randrange(256)
        return bytes(data)
    elif kind == 11:  # cut off
        return good.encode()[: random.randrange(len(good))]
    elif kind == 12:  # more than any memory would hold
        return (
            good + random.choice((BOMB, BOMB + "validation_prompt: *l\n", MERGES, "validation_prompt: &v [*v]\n"))
        ).encode()
    else:  # none at all
        return random.choice(
            (b"", b"\x00" * 100, b"{}", b"[]", b"a", b"- 1\n- 2\n", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"{", b"1: 2")
        )
    return "\n".join(lines).encode(errors="surrogatepass")


# Folders


def edit(value: object, random: random.Random) -> object:
    """What stands in JSON, changed somewhere, however deep."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        kind = random.randrange(5)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, "more": 1}
        return {**value, key: edit(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        i = random.randrange(len(value))
        return [*value[:i], edit(value[i], random), *value[i + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.5:
        return random.choice((value + 1, -value, value * 2, 0, 10**30, math.nan, -1, value + 0.5))
    return random.choice(
        (
            None,
            True,
            False,
            0,
            -1,
            1,
            0.5,
            10**30,
            math.nan,
            math.inf,
            "",
            "x",
            "OFT",
            "LORA",
            "BOFT",
            [],
            ["x"],
            {},
            {"x": 1},
            "none",
            "all",
        )
    )


def disturb_tensors(path: Path, random: random.Random) -> None:
    """Tensors of a file that are renamed, missing, of other shapes or types, or no numbers."""
    tensors = load_file(path)
    name = random.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = random.randrange(9)
    if kind == 1:
        tensors[f"{name}.x"] = tensor
    elif kind == 2:
        tensors[name] = tensor[..., :-1].contiguous() if tensor.shape[-1] > 1 else tensor.flatten()[:0]
    elif kind == 3:
        tensors[name] = tensor.reshape(-1)
    elif kind == 4:
        tensors[name] = tensor.to(random.choice((torch.int64, torch.bool, torch.float16, torch.float64)))
    elif kind == 5:
        tensors[name] = torch.full_like(tensor, random.choice((math.nan, math.inf, 1e38)))
    elif kind == 6:
        tensors = {}
    elif kind == 7:
        tensors |= {name: tensor, "more": tensor.clone()}
    elif kind == 8:
        tensors[name] = tensor[None].repeat(3, *[1] * tensor.dim())
    save_file(tensors, path)


def disturb_header(path: Path, random: random.Random) -> None:
    """A safetensors file whose first bytes promise something else."""
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    if random.random() < 0.3:
        data[:8] = struct.pack("<Q", random.choice((0, 1, size - 1, size + 1, 2**40, 2**63)))
    else:
        for _ in range(random.choice((1, 4))):
            data[8 + random.randrange(size)] = random.randrange(256)
    path.write_bytes(data)


def disturb(folder: Path, other: Path, random: random.Random) -> None:
    """One thing that happens to folders that are copied, synced, edited or cut off."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, kind = random.choice(files), random.randrange(11)
    texts = [file for file in files if file.suffix == ".json"]
    tensors = [file for file in files if file.suffix == ".safetensors"]
    if kind == 0:
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    elif kind == 1:
        data = bytearray(path.read_bytes())
        for _ in range(random.choice((1, 10))):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        path.unlink()
        path.mkdir()
    elif kind == 4:  # the file of the same name of another run
        theirs = sorted(file for file in other.rglob(path.name) if file.is_file())
        shutil.copy(random.choice(theirs or [random.choice(files)]), path)
    elif kind == 5:
        path.rename(path.with_name(random.choice(("x", f"{path.name}.part", f"._{path.name}", "adapter_model.bin"))))
    elif kind == 6:
        path.write_bytes(
            random.choice(
                (
                    b"",
                    b"\x00" * 64,
                    b"{}",
                    b"[]",
                    b"null",
                    b"1",
                    b"\xff\xfe{}",
                    b"version https://git-lfs.github.com/spec/v1\n",
                )
            )
        )
    elif kind in (7, 8):
        text = random.choice(texts)
        content = edit(json.loads(text.read_text()), random)
        text.write_text(json.dumps(content), encoding=random.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")))
    elif kind == 9:
        disturb_tensors(random.choice(tensors), random)
    else:
        disturb_header(random.choice(tensors), random)


def disturb_state(path: Path, random: random.Random) -> None:
    """The optimizer's file, readable, with something else in it."""
    state = torch.load(path, weights_only=True)
    holder = random.choice((state, state["optimizer"], state["schedule"], state["config"]))
    key = random.choice(sorted(holder, key=str))
    if random.random() < 0.3:
        del holder[key]
    else:
        holder[key] = random.choice(
            (None, -1, 0.5, "x", [], {}, torch.zeros(2), [{}], math.nan, 10**30, {"x": 1}, {0: {}})
        )
    torch.save(state if random.random() < 0.9 else random.choice(([], {}, None, 1, torch.zeros(1))), path)
