"""Sharded checkpoints that were damaged or forged: every one is noticed, and the last good one is loaded."""

import json
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from harness import fault_runs
from harness import layout_runs as runs
from test_training import run

from tokenyard_train.checkpoint import newest_good, verify
from tokenyard_train.checkpoint.manifest import manifest_digest


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


def anything(draw, folder):
    return draw.choice(sorted(folder.iterdir()))


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def change(path, content):
    assert content != path.read_bytes()
    path.write_bytes(content)


def flip(draw, folder, older):
    path = anything(draw, folder)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    change(path, bytes(content))


def truncate(draw, folder, older):
    path = anything(draw, folder)
    change(path, path.read_bytes()[: draw.randrange(path.stat().st_size)])


def delete(draw, folder, older):
    anything(draw, folder).unlink()


def swap(draw, folder, older):
    a, b = draw.sample(shards(folder), 2)
    first, second = a.read_bytes(), b.read_bytes()
    change(a, second)
    change(b, first)


def stale(draw, folder, older):
    name = draw.choice([path.name for path in folder.iterdir()])
    change(folder / name, (older / name).read_bytes())


def zero(draw, folder, older):
    path = draw.choice(shards(folder))
    content = path.read_bytes()
    at = draw.choice([i for i in range(0, len(content), 4096) if any(content[i : i + 4096])])
    change(path, content[:at] + bytes(len(content[at : at + 4096])) + content[at + 4096 :])


def edit(draw, folder, older):
    """Another size, hash, name or digest in the manifest, or one entry less."""
    manifest = json.loads((folder / "manifest.json").read_text())
    name = draw.choice(sorted(manifest["files"]))
    what = draw.choice(["bytes", "sha256", "name", "digest", "format", "less"])
    if what == "bytes":
        manifest["files"][name]["bytes"] += draw.choice((-1, 1))
    elif what == "sha256":
        manifest["files"][name]["sha256"] = draw.randbytes(32).hex()
    elif what == "name":
        manifest["files"][name + "x"] = manifest["files"].pop(name)
    elif what == "digest":
        manifest["digest"] = draw.randbytes(32).hex()
    elif what == "format":
        manifest["format"] = 2
    else:
        del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def escape(draw, folder, older):
    """A manifest that is whole in itself, and names a file outside the folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    outside = draw.choice(["../escaped", "/etc/hostname", "a/../../escaped"])
    manifest["files"][outside] = {"bytes": 0, "sha256": "0" * 64}
    manifest["digest"] = manifest_digest({key: manifest[key] for key in ("format", "files")})
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def link(draw, folder, older):
    """A shard that is a link to one elsewhere, of the same bytes."""
    path = draw.choice(shards(folder))
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)


def bomb(draw, folder, older):
    """A pickle that torch's own checkpoints would load, or one in the place of a shard."""
    name = draw.choice([".metadata", "__0_0.distcp", "optimizer.pt", shards(folder)[0].name])
    (folder / name).write_bytes(pickle.dumps(Bomb()))


CORRUPTIONS = (flip, truncate, delete, swap, stale, zero, edit, escape, link, bomb)


@pytest.fixture
def saved(settings, tmp_path):
    """Three checkpoints of two processes."""
    run(runs.trained, "fsdp-2-ep2", settings, tmp_path, save_interval="1ba", max_duration="3ba")
    return tmp_path / "fsdp-2-ep2"


def test_every_corruption_is_noticed(saved, tmp_path, monkeypatch):
    """Whatever is done to the newest checkpoint, the one before is taken; prints how many of each kind (-s)."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    draw, done = random.Random(5), Counter()
    for i in range(600):
        corrupt = CORRUPTIONS[i % len(CORRUPTIONS)]
        folder = tmp_path / "copy" / "run"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(saved, folder)
        corrupt(draw, folder / "ba3", folder / "ba2")
        assert newest_good(folder) == folder / "ba2", corrupt.__name__
        done[corrupt.__name__] += 1
    print(f"\n{sum(done.values())} corruptions, all noticed: {dict(done)}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("layout", ["fsdp-2-ep2", "single"])
def test_the_last_good_one_is_loaded(saved, settings, tmp_path, layout):
    """By the processes of a run, which read a share of the files each, or by one."""
    whole = run(runs.loaded, "single", settings, tmp_path, autoresume=True, save_folder=str(saved))
    assert whole.batch == 3
    flip(random.Random(1), saved / "ba3", saved / "ba2")
    before = run(runs.loaded, layout, settings, tmp_path, autoresume=True, save_folder=str(saved))
    assert (before.batch, before.digest == whole.digest) == (2, False)
    shutil.rmtree(saved / "ba3")
    verify(saved / "ba2")
    assert (
        run(runs.loaded, "single", settings, tmp_path, autoresume=True, save_folder=str(saved))
        == before
    )


def test_all_damaged_ends_every_process_with_the_same_sentence(saved, settings, tmp_path):
    for folder in saved.glob("ba*"):
        (Path(folder) / "run.json").unlink()
    said = run(
        fault_runs.refused_resume,
        "fsdp-2-ep2",
        settings,
        tmp_path,
        autoresume=True,
        save_folder=str(saved),
    )
    assert f"no checkpoint in {saved} is good" in said
