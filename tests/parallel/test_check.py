"""`tokenyard check` of layouts over processes that do not exist: exact state, sound estimates, clear refusals."""

import io
import re
import time

import pytest
import torch
import yaml
from harness import layout_runs as runs
from rich.console import Console
from torch.distributed.tensor import DTensor

from tokenyard import ConfigError
from tokenyard.testing import ranks
from tokenyard_parallel import fake_world
from tokenyard_parallel.strategies._shard_dim import expert_shard_dim
from tokenyard_train.commands.check import check
from tokenyard_train.commands.memory import estimate
from tokenyard_train.config import load_config, read_config
from tokenyard_train.engine.build_model import build_model, meta_model

DBRX = {"name": "dbrx", "size": "full"}
LAYOUTS = [
    (1, 1, 1),
    (2, 1, 1),
    (2, 2, 1),
    (8, 8, 1),
    (24, 8, 1),
    (48, 16, 3),
    (64, 1, 1),
    (512, 16, 4),
    (4096, 8, 2),
]
COUNTS = [1, 2, 3, 6, 7, 16, 48, 96, 100, 128, 1000, 1024, 1536, 3072, 4096]


@pytest.fixture
def dbrx(settings):
    """Settings of the full DBRX over as many ranks as a test needs."""

    def made(count, degree=1, replicate=1, **changes):
        parallel = {"strategy": {"name": "fsdp", "replicate": replicate}, "expert_parallel": degree}
        batch = {"global_train_batch_size": count, "parallel": parallel}
        return read_config(settings | {"model": DBRX, "max_seq_len": 2048} | batch | changes)

    return made


def cut(size, parts):
    """Return how many rows the first of some ranks holds, as torch cuts them."""
    return -(-size // parts)


def expected(model, count, degree, replicate):
    """Count the numbers on the first rank from shapes alone."""
    shards, numbers = count // replicate, 0
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            numbers += cut(parameter.shape[0], shards) * (parameter.numel() // parameter.shape[0])
        else:  # they are divided exactly, in whatever dimension
            assert parameter.numel() % (shards // degree * degree) == 0
            numbers += parameter.numel() // shards
    return numbers


@pytest.mark.parametrize(("count", "degree", "replicate"), LAYOUTS)
def test_the_state_of_the_full_dbrx_is_exact(dbrx, count, degree, replicate):
    """What check says is what the shards hold, and what the shapes alone say."""
    state_is_exact(dbrx, count, degree, replicate)


@pytest.mark.full
def test_the_state_of_the_full_dbrx_is_exact_over_1_to_4096_processes(dbrx):
    """With every degree of expert parallelism that can be laid out; prints how many, and the time of each (-s)."""
    seconds, refused = {}, []
    for count in COUNTS:
        for degree in (d for d in (1, 2, 4, 8, 16) if count % d == 0):
            began = time.perf_counter()
            try:
                state_is_exact(dbrx, count, degree, 1)
            except ConfigError as error:
                refused.append((count, degree, str(error)))
            seconds[count, degree] = time.perf_counter() - began
    print(f"\n{len(seconds) - len(refused)} layouts exact; s: {seconds}; refused: {refused}")
    assert len(seconds) - len(refused) > 2 * len(refused)


def state_is_exact(dbrx, count, degree, replicate):
    with fake_world(count):
        config = dbrx(count, degree, replicate)
        strategy, model = build_model(config)
        memory = estimate(config, model, strategy.describe(model))
        held = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()
        )
    whole = meta_model(config.model_copy(update={"parallel": type(config.parallel)()}))
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * held, 4 * held, 8 * held)
    assert held == expected(whole, count, degree, replicate)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("exchange", ["all_to_all", "all_to_all_tokens"])
def test_what_two_processes_save_for_the_backward_pass_is_near_the_estimate(
    settings, tmp_path, exchange, precision
):
    """Each within a fifth: routing is never quite even."""
    sizes = {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2}
    model = {"name": "dbrx", "size": "tiny", "d_model": 64, "ffn_config": sizes}
    changes = {
        "model": model,
        "max_seq_len": 128,
        "precision": precision,
        "backends": {"exchange": exchange},
    }
    parallel = {
        "parallel": {"strategy": "fsdp", "expert_parallel": 2},
        "save_folder": str(tmp_path / "run"),
    }
    found = ranks(2).run(runs.memory, settings | changes | parallel)
    for held, saved, memory in found:
        assert memory["parameters"] == held
        assert saved == pytest.approx(memory["activations"] + memory["copies"], rel=0.2)


def test_check_prints_meshes_and_bytes(settings, tmp_path):
    path, console = tmp_path / "config.yaml", Console(file=io.StringIO(), record=True, width=160)
    strategy = {"name": "fsdp", "replicate": 2}
    parallel = {"strategy": strategy, "expert_parallel": 8}
    path.write_text(yaml.safe_dump(settings | {"model": DBRX, "parallel": parallel}))
    with fake_world(64):
        check(load_config(path, ["global_train_batch_size=64"]), console)
    printed = " ".join(console.export_text().split())
    for part in (
        "layout over 64 processes strategy fsdp all but experts 2 replicate x 32 shard",
        "experts 2 replicate x 4 shard x 8 expert_parallel",
        "memory of a process (estimate) parameters 15.",
        "working set",
        "exchange all_to_all_tokens",
    ):
        assert part in printed, printed


REFUSED = {
    (
        12,
        8,
        1,
    ): "expert_parallel is 8, which does not divide the 12 processes of a copy of the model; these do: 1, 2",
    (
        4096,
        1,
        1,
    ): "experts.up [16, 21504, 6144] cannot be cut into 4096 equal shards along any dimension; "
    "expert_parallel 2, 4, 8, 16 would do",
    (
        100,
        2,
        1,
    ): "experts.up [8, 21504, 6144] cannot be cut into 50 equal shards along any dimension; "
    "replicate 25, 50, 100 would do",
    (64, 1, 3): "replicate is 3, which does not divide the 64 processes; these do: 1, 2, 4",
}


@pytest.mark.parametrize(("layout", "sentence"), REFUSED.items())
def test_impossible_layouts_are_refused_with_what_would_work(dbrx, layout, sentence):
    with fake_world(layout[0]), pytest.raises(ConfigError, match=re.escape(sentence)):
        build_model(dbrx(*layout))


EVEN = [((8, 24, 8), 4, 0), ((2, 24, 8), 4, 1), ((2, 6, 8), 4, 2), ((7, 3, 5), 4, 0)]


@pytest.mark.parametrize(
    ("shape", "shards", "dim"),
    [*EVEN, ((16, 21504, 6144), 9, None), ((8, 3, 5), 7, None), ((2, 3, 5), 4, None)],
)
def test_experts_are_cut_where_no_shard_stays_empty(shape, shards, dim):
    assert expert_shard_dim(shape, shards) == dim
    if dim is not None:
        assert len(torch.empty(shape, device="meta").chunk(shards, dim)) == shards


def test_the_working_set_is_what_is_gathered_at_a_time(dbrx):
    """Of the full DBRX in bfloat16: all that is in no block, two blocks, and one unit's gradients twice."""
    block = {
        name: sum(p.numel() for p in parameters)
        for name, parameters in parts(meta_model(dbrx(1))).items()
    }
    with fake_world(64):
        strategy, model = build_model(dbrx(64, 8, precision="amp_bf16"))
        found = strategy.describe(model).working_set
    experts = block["experts"] // 8
    assert found == 4 * block["outside"] + 2 * (4 * block["dense"] + 2 * experts) + max(
        (2 + 2) * experts, (4 + 4) * block["outside"]
    )


def parts(model):
    first = model.blocks[0]
    experts = list(first.ffn.experts.parameters())
    dense = [p for p in first.parameters() if not any(p is e for e in experts)]
    inside = {p for b in model.blocks for p in b.parameters()}
    return {
        "experts": experts,
        "dense": dense,
        "outside": [p for p in model.parameters() if p not in inside],
    }


def test_a_model_over_one_process_gathers_nothing(settings):
    strategy, model = build_model(read_config(settings))
    assert strategy.describe(model).working_set == 0
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model, torch.nn.Module)
