"""Checkpoints are complete or absent, and a damaged one is never loaded."""

import errno
import json
import os
import pickle
import resource
import shutil

import pytest
import torch

from tokenyard_train.checkpoint import (
    CheckpointError,
    checkpoints,
    dcp,
    newest_good,
    read_meta,
    read_tensors,
    verify,
    write,
    write_checkpoint,
)
from tokenyard_train.engine.resume import resume
from tokenyard_train.records.metrics import Metrics


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.randn(6, 5),
        "model.half": torch.randn(3, 4).to(torch.bfloat16),
        "model.scalar": torch.tensor(2.5),
        "optimizer.a.exp_avg": torch.randn(6, 5),
    }


CONFIG = {"model": {"name": "dbrx"}, "tokenizer": {"name": "bytes"}}
META = {"batch": 1, "config": CONFIG, "note": "é"}


def good(folder, tensors, name="ba1", keep=-1):
    return write_checkpoint(folder, name, tensors, META, keep)


def test_tensors_and_json_round_trip_exactly(tmp_path, tensors):
    path = good(tmp_path, tensors)
    verify(path)
    read = {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}
    read_tensors(path, read)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert read_meta(path).items() >= META.items()


def test_no_pickle_is_written(tmp_path, tensors):
    names = {p.name for p in good(tmp_path, tensors).iterdir()}
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}


def test_only_the_newest_are_kept(tmp_path, tensors):
    for i in (1, 2, 9, 10):
        good(tmp_path, tensors, f"ba{i}", keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["ba9", "ba10"]


def test_pruning_does_not_count_damaged_checkpoints_of_later_steps(tmp_path, tensors):
    for i in (5, 10, 15):
        good(tmp_path, tensors, f"ba{i}")
    for i in (10, 15):
        (tmp_path / f"ba{i}" / "run.json").unlink()
    assert newest_good(tmp_path).name == "ba5"
    good(tmp_path, tensors, "ba10", keep=1)
    assert newest_good(tmp_path).name == "ba10"


def corruptions():
    def flip(path, at):
        data = bytearray(path.read_bytes())
        data[at % len(data)] ^= 1 << (at % 8)
        path.write_bytes(data)

    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(0, 1 << 30, (24,), generator=generator).tolist()
    kinds = {}
    for suffix in (".safetensors", "run.json", "manifest.json"):
        for i, offset in enumerate(offsets if suffix != "run.json" else offsets[:6]):
            kinds[f"flip {suffix} {i}"] = lambda files, s=suffix, o=offset: flip(files[s], o)
        kinds[f"truncate {suffix}"] = lambda files, s=suffix: os.truncate(
            files[s], files[s].stat().st_size - 1
        )
        kinds[f"empty {suffix}"] = lambda files, s=suffix: os.truncate(files[s], 0)
        kinds[f"delete {suffix}"] = lambda files, s=suffix: files[s].unlink()
    kinds["zero a block"] = lambda files: files[".safetensors"].write_bytes(
        files[".safetensors"].read_bytes()[:-16] + bytes(16)
    )
    kinds["swap"] = lambda files: shutil.copy(files["run.json"], files[".safetensors"])
    kinds["append"] = lambda files: files[".safetensors"].open("ab").write(b"x")
    kinds["another file"] = lambda files: (files["run.json"].parent / "more.json").write_text("{}")
    kinds["symlink"] = lambda files: (
        shutil.copy(files["run.json"], files["run.json"].parents[1] / "outside.json"),
        files["run.json"].unlink(),
        files["run.json"].symlink_to(files["run.json"].parents[1] / "outside.json"),
    )
    kinds["manifest of no files"] = lambda files: files["manifest.json"].write_text(
        '{"format": 1, "files": {}, "digest": ""}'
    )
    kinds["manifest is a list"] = lambda files: files["manifest.json"].write_text("[]")
    return kinds


CORRUPTIONS = corruptions()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_is_found_and_the_previous_checkpoint_is_loaded(
    tmp_path, tensors, kind, caplog
):
    before = good(tmp_path, tensors, "ba1")
    damaged = good(tmp_path, tensors, "ba2")
    files = {".safetensors": next(damaged.glob("*.safetensors"))}
    files |= {name: damaged / name for name in ("run.json", "manifest.json")}
    CORRUPTIONS[kind](files)
    with pytest.raises(CheckpointError, match=f"checkpoint {damaged}: "):
        verify(damaged)
    assert newest_good(tmp_path) == before
    assert "the checkpoint before it is tried" in caplog.text


def test_stale_shards_of_another_checkpoint_are_found(tmp_path, tensors):
    first = good(tmp_path, tensors, "ba1")
    second = good(tmp_path, {name: t + 1 for name, t in tensors.items()}, "ba2")
    shard = next(first.glob("*.safetensors")).name
    shutil.copy(first / shard, second / shard)
    with pytest.raises(CheckpointError, match=f"{shard} was changed since it was saved"):
        verify(second)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "below/x.json"])
def test_a_manifest_that_leaves_the_folder_is_refused(tmp_path, tensors, name):
    path = good(tmp_path, tensors)
    (tmp_path / "outside.json").write_text("{}")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("run.json")
    del manifest["digest"]
    from tokenyard_train.checkpoint.manifest import manifest_digest

    (path / "manifest.json").write_text(
        json.dumps(manifest | {"digest": manifest_digest(manifest)})
    )
    with pytest.raises(CheckpointError, match=r"manifest.json was changed"):
        verify(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("name", [".metadata", "extra.pt", "data.pkl"])
def test_a_malicious_pickle_never_runs(tmp_path, tensors, name, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = good(tmp_path, tensors)
    (path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="does not belong to it"):
        verify(path)
    from tokenyard_train.checkpoint.manifest import entry_of, write_manifest

    (path / "manifest.json").unlink()
    # An attacker may also rewrite the manifest.
    write_manifest(path, {p.name: entry_of(p) for p in path.iterdir()})
    read_tensors(path, {name: t.clone() for name, t in tensors.items()})
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("failure", ["tensors", "json", "size limit"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_no_debris(
    tmp_path, tensors, failure, monkeypatch
):
    before = good(tmp_path, tensors, "ba1")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        raise full

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if failure == "size limit":  # the kernel refuses to write more
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
        else:
            monkeypatch.setattr(
                *((dcp, "save") if failure == "tensors" else (write, "write_manifest")), fail
            )
        with pytest.raises(
            CheckpointError,
            match=rf"ba2 could not be saved \(.*\); the last good checkpoint is {before}",
        ):
            good(tmp_path, tensors, "ba2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["ba1"]
    verify(before)


def test_unfinished_checkpoints_of_a_killed_run_are_deleted(tmp_path, build):
    run = build()
    (run.folder / ".unfinished-ba3").mkdir(parents=True)
    assert resume(run, Metrics(run.folder / "metrics.jsonl")).batch == 0
    assert not (run.folder / ".unfinished-ba3").exists()


def test_an_error_names_every_damaged_checkpoint(tmp_path, tensors):
    for name in ("ba1", "ba2"):
        (good(tmp_path, tensors, name) / "run.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint in .* is good: .*ba2: run.json is missing; .*ba1: run.json",
    ):
        newest_good(tmp_path)


def forged(folder, tensors, meta):
    """Write a checkpoint whose manifest is right and whose run.json is not."""
    return write_checkpoint(folder, "ba1", tensors, meta, -1)


WRONG = {
    "batch": (None, True, 1.0, 1e30, -1, 10**16, "1", [1]),
    "skipped": (None, True, 0.5, -1, "0"),
    "metrics_bytes": (None, 1e30, -1, "0", {}),
    "optimizer_steps": (None, 1, [1], {"a": 0.5}, {"a": -1}, {"a": True}),
    "config": (
        *(None, 1, [], "text", {}, CONFIG | {"model": []}, CONFIG | {"tokenizer": {"name": 5}}),
        *(CONFIG | {"lora": {"rank": 0, "alpha": 1}}, CONFIG | {"lora": [8]}),
    ),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_forged_run_json_is_one_sentence(key, value, tmp_path, tensors):
    path = forged(tmp_path, tensors, META | {key: value})
    verify(path)
    with pytest.raises(CheckpointError, match=rf"{path}: {key}.* of run.json is not usable: .*;"):
        read_meta(path)


@pytest.mark.parametrize("key", ["batch", "config"])
def test_a_run_json_without_a_key_is_one_sentence(key, tmp_path, tensors):
    path = forged(tmp_path, tensors, {k: v for k, v in META.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"{key} of run.json is not usable"):
        read_meta(path)


@pytest.mark.parametrize("content", ["[" * 200_000, "\xff", "[]", '{"files": NaN}'])
def test_a_manifest_that_is_no_small_object_falls_back(content, tmp_path, tensors):
    first = good(tmp_path, tensors, "ba1")
    (good(tmp_path, tensors, "ba2") / "manifest.json").write_bytes(content.encode("latin-1"))
    assert newest_good(tmp_path) == first


def linked(folder, tensors, name):
    """Make a checkpoint that is a link to a folder elsewhere; return that folder."""
    elsewhere = good(folder / "elsewhere", tensors, name)
    (folder / name).symlink_to(elsewhere)
    return elsewhere


def test_pruning_unlinks_links_and_never_follows_them(tmp_path, tensors):
    elsewhere = linked(tmp_path, tensors, "ba1")
    good(tmp_path, tensors, "ba2", keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["ba2"]
    verify(elsewhere)


def test_a_checkpoint_replaces_a_link_and_not_what_it_points_to(tmp_path, tensors):
    elsewhere = linked(tmp_path, tensors, "ba1")
    (tmp_path / ".unfinished-ba1").symlink_to(elsewhere)
    verify(good(tmp_path, tensors, "ba1"))
    assert not (tmp_path / "ba1").is_symlink()
    verify(elsewhere)


def test_pruning_that_fails_is_a_warning(tmp_path, tensors, monkeypatch, caplog):
    def fail(path):
        if path.name == ".unfinished-ba1" and path.exists():
            assert not (tmp_path / "ba1").exists()  # no reader meets half of it
            raise OSError(errno.EACCES, "Permission denied")

    good(tmp_path, tensors, "ba1")
    monkeypatch.setattr(write, "remove", fail)
    verify(good(tmp_path, tensors, "ba2", keep=1))
    assert "ba1 cannot be deleted (Permission denied)" in caplog.text
