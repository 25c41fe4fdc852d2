"""`tokenyard train` over several ranks equals one process; checkpoints load in any layout."""

import json
import shutil
from itertools import permutations
from pathlib import Path

import pytest
from harness import fault_runs
from harness import layout_runs as runs
from harness.layouts import LAYOUTS, PARALLEL_LAYOUTS, records, run

from tokenyard.testing import ranks

EXAMPLES = Path(__file__).parents[2] / "examples" / "bench"


@pytest.mark.parametrize("layout", PARALLEL_LAYOUTS)
def test_a_run_equals_that_of_one_process(layout, reference):
    """Losses, auxiliary losses, gradient norms and evaluation scores of the metrics file."""
    _, single = reference("single")
    _, folder = reference(layout)
    for kind, keys in (
        ("train", ("loss", "balance_loss", "z_loss", "grad_norm")),
        ("eval", ("loss", "bits_per_byte")),
    ):
        expected = records(single, kind)
        actual = records(folder, kind)
        assert len(actual) == len(expected) > 1
        for a, b in zip(actual, expected):
            assert a["batch"] == b["batch"]
            assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=2e-5)
    assert {path.name for path in folder.glob("ba*")} == {"ba2", "ba4"}


def test_every_layout_starts_from_the_same_weights(settings, tmp_path):
    digests = {layout: run(runs.initial_digest, layout, settings, tmp_path) for layout in LAYOUTS}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("layout", ["ddp-2", "fsdp-2-ep2", "hsdp-4-ep2"])
def test_resuming_in_the_same_layout_is_bit_exact(layout, settings, tmp_path, reference):
    whole, _ = reference(layout)
    first_half = {"scheduler": {"t_max": "4ba"}, "max_duration": "2ba"}
    run(runs.trained, layout, settings, tmp_path, **first_half)
    rest = run(runs.trained, layout, settings, tmp_path, autoresume=True)
    assert rest.losses == whole.losses[2:]
    assert rest.digest == whole.digest


@pytest.mark.parametrize("layout", ["fsdp-2-ep2", "hsdp-4-ep2"])
def test_asynchronous_checkpoints_resume_bit_exact(layout, settings, tmp_path, reference):
    whole, _ = reference(layout)
    changes = {"save_async": True, "save_interval": "1ba"}
    first_part = {"scheduler": {"t_max": "4ba"}, "max_duration": "3ba"}
    run(runs.trained, layout, settings, tmp_path, **first_part, **changes)
    rest = run(runs.trained, layout, settings, tmp_path, autoresume=True, **changes)
    assert rest.losses == whole.losses[3:]
    assert rest.digest == whole.digest
    assert {path.name for path in (tmp_path / layout).glob("ba*")} == {"ba1", "ba2", "ba3", "ba4"}


def test_a_resumed_run_may_recompute_and_offload(settings, tmp_path, reference):
    """The result is bit-identical to that of a run that keeps all activations on the device."""
    whole, _ = reference("fsdp-2-ep2")
    first_half = {"scheduler": {"t_max": "4ba"}, "max_duration": "2ba"}
    run(runs.trained, "fsdp-2-ep2", settings, tmp_path, **first_half)
    keys = {"activation_checkpointing": "selective", "activation_cpu_offload": True}
    rest = run(runs.trained, "fsdp-2-ep2", settings, tmp_path, autoresume=True, **keys)
    assert rest.losses == whole.losses[2:]
    assert rest.digest == whole.digest


SMALL_MIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
SMALL_DBRX = {"d_model": 32, "ffn_config.ffn_hidden_size": 16}


@pytest.mark.parametrize(
    ("file", "sizes"),
    [("qwen3-30b-4-layers", SMALL_MIXTRAL), ("dbrx-1-layer", SMALL_DBRX)],
    ids=["qwen3", "dbrx"],
)
def test_bench_train_over_ranks(settings, tmp_path, file, sizes):
    """The shapes that are benchmarked on GPUs, made small; rank 0 writes the result."""
    overrides = [
        "model.size=tiny",
        "model.vocab_size=257",
        *(f"model.{key}={value}" for key, value in sizes.items()),
        "max_seq_len=32",
        "device=cpu",
        "parallel.strategy=fsdp",
        "parallel.expert_parallel=2",
        "device_train_microbatch_size=2",
        f"train_loader={json.dumps(settings['train_loader'])}",
    ]
    path = str(EXAMPLES / f"{file}.yaml")
    files = ranks(2).run(runs.bench_train, path, str(tmp_path), overrides)
    assert files == [["train.json"], []]
    result = json.loads((tmp_path / "0" / "train.json").read_text())
    assert result["records"][0]["processes"] == 2
    assert result["config"]["parallel"]["expert_parallel"] == 2


@pytest.mark.parametrize("moment", ["collective", "callback"])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_after_the_same_step_when_one_gets_a_signal(
    settings, tmp_path, rank, moment
):
    """Whenever the signal arrives; the step is saved."""
    signal = (rank, 2, moment)
    message, batch = run(
        fault_runs.train_until_signal, "fsdp-2-ep2", settings, tmp_path, *signal, max_duration="9ba"
    )
    assert batch == 3
    assert message.startswith("stopped as asked, after batch 3 of 9, which is saved in")
    assert (tmp_path / "fsdp-2-ep2" / "ba3" / "manifest.json").exists()


def test_all_ranks_end_when_one_cannot_write_a_checkpoint(settings, tmp_path):
    """With the same message, at the same step; the previous checkpoint remains."""
    changes = {"save_async": True, "max_duration": "60ba"}
    message = run(fault_runs.train_with_full_disk, "fsdp-2-ep2", settings, tmp_path, 1, **changes)
    assert "ba2 could not be saved" in message
    assert "No space left on device" in message


def check_resharding(source, targets, settings, tmp_path, reference):
    """Load the last checkpoint of one layout in others: model and optimizer, bit by bit."""
    saved, folder = reference(source)
    for target in targets:
        copy = shutil.copytree(folder, tmp_path / target)
        changes = {"autoresume": True, "save_folder": str(copy)}
        actual = run(runs.loaded, target, settings, tmp_path, **changes)
        assert actual == saved._replace(losses=[]), f"{source} to {target}"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("fsdp-4-ep2", "single"),
        ("single", "hsdp-4-ep2"),
        ("ddp-2", "fsdp-4-ep4"),
        ("hsdp-4-ep2", "ddp-2-ep2"),
    ],
)
def test_a_checkpoint_of_one_layout_loads_in_another(source, target, settings, tmp_path, reference):
    check_resharding(source, [target], settings, tmp_path, reference)


@pytest.mark.parametrize(("source", "target"), [("fsdp-4-ep2", "single"), ("single", "hsdp-4-ep2")])
def test_a_checkpoint_of_muon_loads_in_another_layout(source, target, settings, tmp_path):
    changes = {"optimizer": {"name": "muon", "lr": 0.01}, "max_duration": "2ba"}
    changes |= {"autoresume": True, "save_folder": str(tmp_path / "run")}
    saved = run(runs.trained, source, settings, tmp_path, **changes)
    actual = run(runs.loaded, target, settings, tmp_path, **changes)
    assert actual == saved._replace(losses=[])


WIDE = {"d_model": 64, "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4}}


@pytest.mark.parametrize(("source", "target"), [("fsdp-4-ep2", "single"), ("single", "hsdp-4-ep2")])
def test_moments_in_8_bits_load_in_another_layout(source, target, settings, tmp_path):
    """Rows of 64 are one block, and experts are cut into rows: no block is cut."""
    changes = {"optimizer": {"name": "adamw", "moments": "8bit"}, "max_duration": "2ba"}
    changes |= {"autoresume": True, "save_folder": str(tmp_path / "run")}
    changes["model"] = settings["model"] | WIDE
    saved = run(runs.trained, source, settings, tmp_path, **changes)
    actual = run(runs.loaded, target, settings, tmp_path, **changes)
    assert actual == saved._replace(losses=[])


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stored_moments_train_as_on_one_device(name, moments, settings, tmp_path):
    changes = {"optimizer": {"name": name, "moments": moments, "lr": 0.01}}
    changes["model"] = settings["model"] | WIDE
    alone = run(runs.trained, "single", settings, tmp_path, **changes)
    together = run(runs.trained, "fsdp-2-ep2", settings, tmp_path, **changes)
    assert together.losses == pytest.approx(alone.losses, rel=1e-3)


def test_shards_that_cut_blocks_are_refused(settings, tmp_path):
    """An odd number of experts and of rows leaves the columns to shard."""
    sizes = {"ffn_hidden_size": 63, "moe_num_experts": 3, "moe_top_k": 1}
    model = {"name": "mpt_causal_lm", "size": "tiny", "d_model": 64}
    model["ffn_config"] = {"ffn_type": "mb_moe", **sizes}
    changes = {"optimizer": {"moments": "8bit"}, "model": model}
    message = run(runs.build_error, "fsdp-2", settings, tmp_path, **changes)
    assert message.startswith(
        "ConfigError: optimizer.moments is 8bit, whose blocks have 64 numbers"
    )
    assert "blocks.0.ffn.experts.up is cut into shards of 32 columns; give bf16" in message


@pytest.mark.full
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_ordered_pair_of_layouts(source, settings, tmp_path, reference):
    targets = [target for one, target in permutations(LAYOUTS, 2) if one == source]
    check_resharding(source, targets, settings, tmp_path, reference)


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (
            {"strategy": "single"},
            {},
            "ConfigError: parallel.strategy is 'single', which is for one rank, "
            "and 2 were started; give fsdp or ddp",
        ),
        (
            {"strategy": "fsdp", "expert_parallel": 4},
            {},
            "ConfigError: parallel.strategy: expert_parallel is 4, which does not divide the 2 "
            "ranks of a copy of the model; these do: 1, 2",
        ),
        (
            {"strategy": "fsdp", "expert_parallel": 3},
            {},
            "ConfigError: expert_parallel is 3, which does not divide num_experts 4; "
            "these do: 1, 2, 4",
        ),
        (
            {"strategy": "ddp", "expert_parallel": 2},
            {"compile": True, "activation_checkpointing": "selective"},
            "ConfigError: compile is true, activation_checkpointing is selective, and the model is "
            "sharded over 2 ranks; give activation_checkpointing true or false, or compile false",
        ),
        (
            {"strategy": {"name": "fsdp", "replicate": 3}},
            {},
            "ConfigError: replicate is 3, which does not divide the 2 ranks; these do: 1, 2",
        ),
        (
            {"strategy": "fsdp"},
            {"global_train_batch_size": 7},
            "ConfigError: global_train_batch_size is 7, which 2 ranks cannot share evenly; "
            "try 6 or 8",
        ),
        (
            {"strategy": "fsdp"},
            {"device_train_microbatch_size": 3},
            "ConfigError: device_train_microbatch_size is 3, which does not divide "
            "global_train_batch_size 8 / 2 ranks",
        ),
    ],
)
def test_impossible_layouts_raise_with_what_would_work(
    settings, tmp_path, parallel, changes, message
):
    config = settings | {"parallel": parallel, "save_folder": str(tmp_path)} | changes
    errors = ranks(2).run(runs.build_error, config)
    assert errors[0] == errors[1]
    assert errors[0].startswith(message)
