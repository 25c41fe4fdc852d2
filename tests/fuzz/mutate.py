"""Change values, texts and files at random, so that nearly the same thing results."""

from __future__ import annotations

import copy
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, 2.0, -0.0, 1e-308, 1e-5, 1e30, 1e308, float("inf"), float("nan")),
    *("", " ", "a", "0", "5", "1e400", "true", "null", "auto", "\x00", "\n", "a" * 300, "x" * 5000),
    *("..", "~", "~nobody/x", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "."),
    *("s3://bucket/x", "hf://", "hf://.", "a/b/../c", "${seed}", "${oc.env:HOME}", "${", "${.}"),
    *("1ba", "0.5dur", "1e15tok", "9" * 30 + "ba", "torch", "dbrx", "bytes", "cuda", "meta"),
    *("ü\u2028", "\ud7ff", "%s %d {0}", "[bold]", "*", "blocks.*"),
    *([], [1], [[]], [None], {}, {"name": 5}, {"name": "text"}, {"": ""}, {"a": {"b": {}}}),
]
"""Values that are wrong nearly everywhere: other types, other sizes, names that mean something."""

_INSERTED = (
    *(
        "&a ",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system [id]",
        "!!binary aaaa",
        "!!set {a, b}",
    ),
    *(
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "\t",
        "\ufeff",
        "\x00",
        "\x85",
        "[" * 3000,
        "{a: " * 50,
        "? ",
    ),
    *(
        "- " * 300,
        "|\n",
        "'",
        '"',
        "#",
        ": ",
        "\\u0000",
        "190:20:30",
        "2001-01-01",
        "0x_",
        "1_0",
        "...",
    ),
)


def mutate_tree(draw: random.Random, tree: Any, odd: list[Any] = ODD) -> tuple[Any, str]:
    """Return a copy of a tree of mappings and lists with one place changed, and what was done."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree, ()))
    if not places:
        return draw.choice(odd), "all replaced"
    holder, key, path = draw.choice(places)
    name = ".".join(map(str, path))
    kind = draw.choice(
        ("replace", "replace", "replace", "delete", "rename", "swap", "scale", "wrap")
    )
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice((f"{key}s", key[:-1], key.upper(), "", "a" * 300))] = holder.pop(key)
    elif kind == "swap":
        other, other_key, other_path = draw.choice(places)
        if other_path[: len(path)] != path and path[: len(other_path)] != other_path:
            values = holder[key], other[other_key]
            other[other_key], holder[key] = values
        name += f" and {'.'.join(map(str, other_path))}"
    elif kind == "scale" and type(holder[key]) in (int, float):
        holder[key] = _scaled(draw, holder[key])
    elif kind == "wrap":
        holder[key] = draw.choice(([holder[key]], {"name": holder[key]}, str(holder[key])))
    else:
        kind = "replace"
        holder[key] = copy.deepcopy(draw.choice(odd))
    return tree, f"{kind} {name}"


def _scaled(draw: random.Random, value: float) -> Any:
    factor = draw.choice((-1, 10, 10**6, 10**9, 10**15, 10**25))
    return value * factor if draw.random() < 0.5 else value + factor


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        yield tree, key, (*path, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))


def mutate_text(draw: random.Random, text: str) -> tuple[str, str]:
    """Return a text with some characters or lines changed, and what was done."""
    kind = draw.choice(("insert", "insert", "insert", "line", "lines", "cut", "flip"))
    at = draw.randrange(len(text) + 1)
    lines = text.splitlines(keepends=True)
    if kind == "insert":
        inserted = draw.choice(_INSERTED)
        return text[:at] + inserted + text[at:], f"insert {inserted[:20]!r} at {at}"
    if kind in ("line", "lines") and lines:  # one twice, or two exchanged
        first, second = draw.randrange(len(lines)), draw.randrange(len(lines))
        if kind == "line":
            lines.insert(second, lines[first])
        else:
            lines[first], lines[second] = lines[second], lines[first]
        return "".join(lines), f"{kind} {first} {second}"
    if kind == "cut":
        return text[:at], f"cut at {at}"
    return text[:at] + chr(draw.choice((0, 9, 10, 34, 42, 58, 91, 123, 160))) + text[at + 1 :], (
        f"flip at {at}"
    )


def mutate_bytes(draw: random.Random, content: bytes, most: int | None = None) -> tuple[bytes, str]:
    """Return bytes with some changed, and what was done; `most` keeps to the first ones."""
    size = min(len(content), most or len(content))
    at = draw.randrange(size + 1)
    kind = draw.choice(("cut", "flip", "flip", "set", "zeros", "insert", "append", "remove"))
    if kind == "cut":
        changed = content[:at]
    elif kind == "flip" and at < len(content):
        changed = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    elif kind == "set":
        changed = content[:at] + draw.choice((b"\xff", b"\x00", b"\x80", b"{")) + content[at + 1 :]
    elif kind == "zeros":
        length = draw.choice((1, 8, 64))
        changed = content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    elif kind == "remove":
        changed = content[:at] + content[at + draw.choice((1, 7, 64)) :]
    else:
        inserted = draw.randbytes(draw.choice((1, 8, 100)))
        place = len(content) if kind == "append" else at
        changed = content[:place] + inserted + content[place:]
    return changed, f"{kind} at {at}"


def replace_file(draw: random.Random, path: Path) -> str:
    """Put something else at a path: nothing, a folder, a pipe, a link, an empty file."""
    kind = draw.choice(("none", "folder", "pipe", "dangling", "loop", "device", "empty", "full"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(draw.choice(("/dev/zero", "/dev/full", "/dev/null", "/dev/tty")))
    elif kind in ("dangling", "loop"):
        path.symlink_to("no-such-file" if kind == "dangling" else path.name)
    elif kind in ("empty", "full"):
        path.write_bytes(b"" if kind == "empty" else b"\x00" * 65536)
    return f"{kind} for {path.name}"


def mutate_folder(draw: random.Random, folder: Path, likely: str = "*") -> str:
    """Change a file of a folder: its bytes, its kind or its name. Returns what was done."""
    paths = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
    chosen = [path for path in paths if path.match(likely)] or paths
    path = draw.choice(chosen if draw.random() < 0.5 else paths)
    name = str(path.relative_to(folder))
    kind = draw.choice(("bytes", "bytes", "head", "replace", "copy", "swap"))
    if kind in ("bytes", "head") and path.is_file():
        content, done = mutate_bytes(draw, path.read_bytes(), 256 if kind == "head" else None)
        path.write_bytes(content)
        return f"{name}: {done}"
    if kind == "copy" and (path.is_file() or path.is_dir()):  # under another name
        other = path.with_name(
            draw.choice(("ba9", "ba3", "extra", "x.safetensors", "a.tmp", "x.json"))
        )
        if not other.exists():
            with suppress(shutil.Error):  # an earlier change has left a pipe in it
                (shutil.copytree if path.is_dir() else shutil.copy)(path, other)
        return f"{name}: copied to {other.name}"
    if kind == "swap":
        other = draw.choice([each for each in paths if each.is_file() == path.is_file()])
        _swap(path, other)
        return f"{name}: swapped with {other.relative_to(folder)}"
    return replace_file(draw, path) + f" ({name})"


def _swap(one: Path, other: Path) -> None:
    if one == other or one in other.parents or other in one.parents:
        return
    kept = one.with_name("swapped")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)
