"""`tokenyard train` over several processes: the run of one process, and its checkpoints in any layout."""

import json
from itertools import permutations
from pathlib import Path

import pytest
from harness import fault_runs
from harness import layout_runs as runs

from tokenyard.testing import ranks

LAYOUTS = {
    "single": (1, {}),
    "ddp-2": (2, {"strategy": "ddp"}),
    "fsdp-2": (2, {"strategy": "fsdp"}),
    "fsdp-2-ep2": (2, {"strategy": "fsdp", "expert_parallel": 2}),
    "ddp-2-ep2": (2, {"strategy": "ddp", "expert_parallel": 2}),
    "fsdp-4-ep2": (4, {"strategy": "fsdp", "expert_parallel": 2}),
    "fsdp-4-ep4": (4, {"strategy": "fsdp", "expert_parallel": 4}),
    "hsdp-4-ep2": (4, {"strategy": {"name": "fsdp", "replicate": 2}, "expert_parallel": 2}),
}


def run(function, layout, settings, tmp_path, *args, **changes):
    """Run a function of `runs` on every rank of a layout; all ranks must return the same."""
    count, parallel = LAYOUTS[layout]
    sizes = {"device_train_microbatch_size": 4 // count, "device_eval_batch_size": 2}
    changed = (
        settings | sizes | {"parallel": parallel, "save_folder": str(tmp_path / layout)} | changes
    )
    first, *rest = (
        [function(changed, *args)] if count == 1 else ranks(count).run(function, changed, *args)
    )
    assert all(other == first for other in rest), "ranks disagree"
    return first


def records(folder, kind):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_a_run_is_that_of_one_process(layout, settings, tmp_path):
    """Losses, auxiliary losses, gradient norms, loads and held-out scores, from one metrics file."""
    run(runs.trained, "single", settings, tmp_path)
    run(runs.trained, layout, settings, tmp_path)
    for kind, keys in (
        ("train", ("loss", "balance_loss", "z_loss", "grad_norm")),
        ("eval", ("loss", "bits_per_byte")),
    ):
        want, got = records(tmp_path / "single", kind), records(tmp_path / layout, kind)
        assert len(got) == len(want) > 1
        for a, b in zip(got, want):
            assert a["batch"] == b["batch"]
            assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=2e-5)
    assert {path.name for path in (tmp_path / layout).glob("ba*")} == {"ba2", "ba4"}


def test_every_layout_starts_from_the_same_weights(settings, tmp_path):
    digests = {layout: run(runs.initial, layout, settings, tmp_path) for layout in LAYOUTS}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("layout", ["ddp-2", "fsdp-2-ep2", "hsdp-4-ep2"])
def test_resuming_in_the_same_layout_is_bit_exact(layout, settings, tmp_path):
    whole = run(runs.trained, layout, settings, tmp_path, save_folder=str(tmp_path / "whole"))
    run(runs.trained, layout, settings, tmp_path, scheduler={"t_max": "4ba"}, max_duration="2ba")
    rest = run(runs.trained, layout, settings, tmp_path, autoresume=True)
    assert rest.losses == whole.losses[2:]
    assert rest.digest == whole.digest


@pytest.mark.parametrize("layout", ["fsdp-2-ep2", "hsdp-4-ep2"])
def test_checkpoints_written_while_training_goes_on_are_the_same(layout, settings, tmp_path):
    """And the next run goes on from them."""
    whole = run(runs.trained, layout, settings, tmp_path, save_folder=str(tmp_path / "whole"))
    changes = {"save_async": True, "save_interval": "1ba"}
    run(
        runs.trained,
        layout,
        settings,
        tmp_path,
        scheduler={"t_max": "4ba"},
        max_duration="3ba",
        **changes,
    )
    rest = run(runs.trained, layout, settings, tmp_path, autoresume=True, **changes)
    assert rest.losses == whole.losses[3:]
    assert rest.digest == whole.digest
    assert {path.name for path in (tmp_path / layout).glob("ba*")} == {"ba1", "ba2", "ba3", "ba4"}


@pytest.mark.parametrize("file", ["qwen3-30b-4-layers", "dbrx-1-layer"])
def test_training_over_ranks_is_measured(settings, tmp_path, file):
    """The shapes that are measured on GPUs, cut down; the first process writes the result."""
    sizes = {
        "dbrx-1-layer": ["model.size=tiny"],
        "qwen3-30b-4-layers": ["model.size=tiny", "model.hidden_size=64"],
    }
    shared = (
        ["model.num_local_experts=8", "model.num_experts_per_tok=2"]
        if file.startswith("qwen")
        else []
    )
    small = [*sizes[file], *shared, "max_seq_len=32", "device=cpu"]
    small += ["parallel.strategy=fsdp", "parallel.expert_parallel=2"]
    small += [
        f"train_loader={json.dumps(settings['train_loader'])}",
        "device_train_microbatch_size=2",
    ]
    path = str(Path(__file__).parents[2] / "examples" / "bench" / f"{file}.yaml")
    assert ranks(2).run(runs.benched, path, str(tmp_path), small) == [["train.json"], []]
    found = json.loads((tmp_path / "0" / "train.json").read_text())
    assert found["records"][0]["processes"] == 2
    assert found["config"]["parallel"]["expert_parallel"] == 2


@pytest.mark.parametrize("where", ["collective", "callback"])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_stop_together_when_one_is_asked_to(settings, tmp_path, rank, where):
    """Whenever it hears the signal; after the same step, which is saved."""
    said, batch = run(
        fault_runs.asked, "fsdp-2-ep2", settings, tmp_path, rank, 2, where, max_duration="9ba"
    )
    assert batch == 3
    assert said.startswith("stopped as asked, after batch 3 of 9, which is saved in")
    assert (tmp_path / "fsdp-2-ep2" / "ba3" / "manifest.json").exists()


def test_a_checkpoint_that_one_process_cannot_write_ends_all_of_them(settings, tmp_path):
    """With the same sentence, at the same step; the checkpoint before stands."""
    said = run(
        fault_runs.unwritable,
        "fsdp-2-ep2",
        settings,
        tmp_path,
        1,
        save_async=True,
        max_duration="60ba",
    )
    assert "ba2 could not be saved" in said
    assert "No space left on device" in said


def reshard(source, targets, settings, tmp_path):
    saved = run(runs.trained, source, settings, tmp_path, max_duration="2ba")
    for target in targets:
        got = run(
            runs.loaded,
            target,
            settings,
            tmp_path,
            autoresume=True,
            save_folder=str(tmp_path / source),
        )
        assert got == saved._replace(losses=[]), f"{source} to {target}"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("fsdp-4-ep2", "single"),
        ("single", "hsdp-4-ep2"),
        ("ddp-2", "fsdp-4-ep4"),
        ("hsdp-4-ep2", "ddp-2-ep2"),
    ],
)
def test_a_checkpoint_of_one_layout_loads_in_another(source, target, settings, tmp_path):
    """Model and optimizer, bit by bit."""
    reshard(source, [target], settings, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_ordered_pair_of_layouts(source, settings, tmp_path):
    reshard(
        source,
        [target for one, target in permutations(LAYOUTS, 2) if one == source],
        settings,
        tmp_path,
    )


def test_what_cannot_be_laid_out_is_refused_with_what_would_work(settings, tmp_path):
    def said(parallel, **changes):
        told = ranks(2).run(
            runs.refused, settings | {"parallel": parallel, "save_folder": str(tmp_path)} | changes
        )
        assert told[0] == told[1]
        return told[0]

    assert said({"strategy": "single"}) == (
        "ConfigError: parallel.strategy is 'single', which is for one process, and 2 were started; give fsdp or ddp"
    )
    assert said({"strategy": "fsdp", "expert_parallel": 4}) == (
        "ConfigError: parallel.strategy: expert_parallel is 4, which does not divide the 2 processes of a copy of the "
        "model; these do: 1, 2"
    )
    assert said({"strategy": "fsdp", "expert_parallel": 3}).startswith(
        "ConfigError: expert_parallel is 3, which does not divide num_experts 4; these do: 1, 2, 4"
    )
    assert said({"strategy": {"name": "fsdp", "replicate": 3}}) == (
        "ConfigError: replicate is 3, which does not divide the 2 processes; these do: 1, 2"
    )
    assert said({"strategy": "fsdp"}, global_train_batch_size=7) == (
        "ConfigError: global_train_batch_size is 7, which 2 processes cannot share evenly; try 6 or 8"
    )
    assert said({"strategy": "fsdp"}, device_train_microbatch_size=3).startswith(
        "ConfigError: device_train_microbatch_size is 3, which does not divide global_train_batch_size 8 / 2 processes"
    )
