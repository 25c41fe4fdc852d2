"""Damaged or forged sharded checkpoints are detected, and the last good one is loaded."""

import json
import os
import pickle
import random
import shutil
from collections import Counter

import pytest
from harness import fault_runs
from harness import layout_runs as runs
from harness.layouts import run

from tokenyard_train.checkpoint import newest_good, verify
from tokenyard_train.checkpoint.manifest import write_manifest


class Bomb:
    """Creates the file `$BOMB` when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


def any_file(draw, folder):
    return draw.choice(sorted(folder.iterdir()))


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def change(path, content):
    assert content != path.read_bytes()
    path.write_bytes(content)


def flip(draw, folder, older):
    path = any_file(draw, folder)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    change(path, bytes(content))


def truncate(draw, folder, older):
    path = any_file(draw, folder)
    change(path, path.read_bytes()[: draw.randrange(path.stat().st_size)])


def delete(draw, folder, older):
    any_file(draw, folder).unlink()


def swap(draw, folder, older):
    a, b = draw.sample(shards(folder), 2)
    content = a.read_bytes()
    change(a, b.read_bytes())
    change(b, content)


def stale(draw, folder, older):
    name = draw.choice([path.name for path in folder.iterdir()])
    change(folder / name, (older / name).read_bytes())


def zero(draw, folder, older):
    path = draw.choice(shards(folder))
    content = path.read_bytes()
    starts = range(0, len(content), 4096)
    start = draw.choice([i for i in starts if any(content[i : i + 4096])])
    page = content[start : start + 4096]
    change(path, content[:start] + bytes(len(page)) + content[start + len(page) :])


def edit(draw, folder, older):
    """Change a size, hash, name, digest or the format in the manifest, or remove an entry."""
    manifest = json.loads((folder / "manifest.json").read_text())
    name = draw.choice(sorted(manifest["files"]))
    field = draw.choice(["bytes", "sha256", "name", "digest", "format", "less"])
    if field == "bytes":
        manifest["files"][name]["bytes"] += draw.choice((-1, 1))
    elif field == "sha256":
        manifest["files"][name]["sha256"] = draw.randbytes(32).hex()
    elif field == "name":
        manifest["files"][name + "x"] = manifest["files"].pop(name)
    elif field == "digest":
        manifest["digest"] = draw.randbytes(32).hex()
    elif field == "format":
        manifest["format"] = 2
    else:
        del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def escape(draw, folder, older):
    """Name a file outside the folder, in a manifest whose digest is right."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    outside = draw.choice(["../escaped", "/etc/hostname", "a/../../escaped"])
    write_manifest(folder, files | {outside: {"bytes": 0, "sha256": "0" * 64}})


def link(draw, folder, older):
    """Replace a shard by a link to the same bytes elsewhere."""
    path = draw.choice(shards(folder))
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)


def bomb(draw, folder, older):
    """Add a pickle that torch's checkpoints would load, or replace a shard by a pickle."""
    name = draw.choice([".metadata", "__0_0.distcp", "optimizer.pt", shards(folder)[0].name])
    (folder / name).write_bytes(pickle.dumps(Bomb()))


CORRUPTIONS = (flip, truncate, delete, swap, stale, zero, edit, escape, link, bomb)


@pytest.fixture(scope="module")
def three_checkpoints(small_config, tmp_path_factory):
    """A run of two ranks with three checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    run(runs.trained, "fsdp-2-ep2", small_config(), folder, save_interval="1ba", max_duration="3ba")
    return folder / "fsdp-2-ep2"


@pytest.fixture
def saved(three_checkpoints, tmp_path):
    return shutil.copytree(three_checkpoints, tmp_path / "saved")


def test_every_corruption_is_detected(three_checkpoints, tmp_path, monkeypatch):
    """The checkpoint before the corrupted one is chosen; prints the count of each kind (-s)."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    draw = random.Random(5)
    counts = Counter()
    folder = tmp_path / "copy" / "run"
    for i in range(600):
        corrupt = CORRUPTIONS[i % len(CORRUPTIONS)]
        shutil.rmtree(folder.parent, ignore_errors=True)
        for name in ("ba2", "ba3"):
            shutil.copytree(three_checkpoints / name, folder / name)
        corrupt(draw, folder / "ba3", folder / "ba2")
        assert newest_good(folder) == folder / "ba2", corrupt.__name__
        counts[corrupt.__name__] += 1
    print(f"\n{counts.total()} corruptions, all detected: {dict(counts)}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("layout", ["fsdp-2-ep2", "single"])
def test_the_last_good_checkpoint_is_loaded(saved, settings, tmp_path, layout):
    """By one process, or by two ranks, each of which verifies some of the files."""
    changes = {"autoresume": True, "save_folder": str(saved)}
    newest = run(runs.loaded, "single", settings, tmp_path, **changes)
    assert newest.batch == 3
    flip(random.Random(1), saved / "ba3", saved / "ba2")
    good = run(runs.loaded, layout, settings, tmp_path, **changes)
    assert good.batch == 2
    assert good.digest != newest.digest
    shutil.rmtree(saved / "ba3")
    verify(saved / "ba2")
    assert run(runs.loaded, "single", settings, tmp_path, **changes) == good


def test_ranks_end_with_the_same_error_when_all_checkpoints_are_damaged(saved, settings, tmp_path):
    for folder in saved.glob("ba*"):
        (folder / "run.json").unlink()
    changes = {"autoresume": True, "save_folder": str(saved)}
    message = run(fault_runs.resume_error, "fsdp-2-ep2", settings, tmp_path, **changes)
    assert f"no checkpoint in {saved} is good" in message
