"""`tokenyard check` of layouts over ranks that do not exist: exact state, estimates, refusals."""

import io
import re
import time
from math import ceil, comb

import pytest
import torch
import yaml
from harness import layout_runs as runs
from rich.console import Console

from tokenyard import ConfigError, moe_layers
from tokenyard.sharded import local_part
from tokenyard.testing import ranks
from tokenyard_parallel import fake_world
from tokenyard_parallel.strategies._shard_dim import expert_shard_dim
from tokenyard_train.commands.check import check
from tokenyard_train.commands.host_time import why_ranks_lose
from tokenyard_train.commands.memory import estimate
from tokenyard_train.config import load_config, read_config
from tokenyard_train.engine.build_model import build_model, meta_model

DBRX = {"name": "dbrx", "size": "full"}
LAYOUTS = [  # ranks, expert_parallel, replicate
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
    """Return a function that returns the config of the full DBRX over some ranks."""

    def config(count, degree=1, replicate=1, **changes):
        parallel = {"strategy": {"name": "fsdp", "replicate": replicate}, "expert_parallel": degree}
        batch = {"global_train_batch_size": count, "parallel": parallel}
        return read_config(settings | {"model": DBRX, "max_seq_len": 2048} | batch | changes)

    return config


def expected_numel(model, count, degree, replicate):
    """Return the numel of the parameters of rank 0, from shapes alone."""
    shards = count // replicate
    numel = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # experts are sharded evenly, along whichever dimension
            assert parameter.numel() % (shards // degree * degree) == 0
            numel += parameter.numel() // shards
        else:
            numel += ceil(parameter.shape[0] / shards) * parameter[0].numel()
    return numel


STATES = {  # precision and moments -> bytes of a weight, a gradient, and masters with moments
    ("fp32", "fp32"): (4, 4, 8),
    ("bf16_master", "fp32"): (2, 2, 12),
    ("bf16_master", "bf16"): (2, 2, 8),
}


def check_state(dbrx, count, degree, replicate, precision="fp32", moments="fp32"):
    """Compare the estimate with the shards, and the shards with the shapes."""
    with fake_world(count):
        config = dbrx(count, degree, replicate, precision=precision, optimizer={"moments": moments})
        strategy, model = build_model(config)
        memory = estimate(config, model, strategy.describe(model))
        numel = sum(local_part(p).numel() for p in model.parameters())
    whole = meta_model(config.model_copy(update={"parallel": type(config.parallel)()}))
    state = (memory.parameters, memory.gradients, memory.optimizer)
    assert state == tuple(width * numel for width in STATES[precision, moments])
    assert numel == expected_numel(whole, count, degree, replicate)


@pytest.mark.parametrize(("count", "degree", "replicate"), LAYOUTS)
def test_the_state_of_the_full_dbrx_is_exact(dbrx, count, degree, replicate):
    check_state(dbrx, count, degree, replicate)


@pytest.mark.parametrize(("precision", "moments"), STATES)
def test_the_state_of_each_precision_is_exact(dbrx, precision, moments):
    check_state(dbrx, 48, 16, 3, precision, moments)


@pytest.mark.full
def test_the_state_of_the_full_dbrx_is_exact_over_1_to_4096_ranks(dbrx):
    """With every possible degree of expert parallelism; prints how many, and their times (-s)."""
    seconds = {}
    refused = []
    for count in COUNTS:
        for degree in (d for d in (1, 2, 4, 8, 16) if count % d == 0):
            start = time.perf_counter()
            try:
                check_state(dbrx, count, degree, 1)
            except ConfigError as error:
                refused.append((count, degree, str(error)))
            seconds[count, degree] = time.perf_counter() - start
    print(f"\n{len(seconds) - len(refused)} layouts exact; s: {seconds}; refused: {refused}")
    assert len(seconds) - len(refused) > 2 * len(refused)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16_master"])
@pytest.mark.parametrize(
    "exchange",
    [
        "all_to_all",
        "all_to_all_tokens",
        {"name": "all_to_all_tokens", "precision": "fp8"},
        "symmetric_memory",
    ],
    ids=["slots", "tokens", "tokens in FP8", "symmetric memory"],
)
def test_activations_of_two_ranks_are_near_the_estimate(settings, tmp_path, exchange, precision):
    """Within a fifth, since the routing is not exactly uniform."""
    sizes = {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2}
    settings |= {
        "model": {"name": "dbrx", "size": "tiny", "d_model": 128, "ffn_config": sizes},
        "max_seq_len": 128,
        "precision": precision,
        "backends": {"exchange": exchange},
        "parallel": {"strategy": "fsdp", "expert_parallel": 2},
        "save_folder": str(tmp_path / "run"),
    }
    for use in ranks(2).run(runs.memory_use, settings):
        assert use.estimate["parameters"] == use.parameters
        activations = use.estimate["activations"] + use.estimate["copies"]
        assert use.saved == pytest.approx(activations, rel=0.2)


def test_check_prints_meshes_and_bytes(settings, tmp_path):
    path = tmp_path / "config.yaml"
    console = Console(file=io.StringIO(), record=True, width=160)
    strategy = {"name": "fsdp", "replicate": 2}
    parallel = {"strategy": strategy, "expert_parallel": 8}
    path.write_text(yaml.safe_dump(settings | {"model": DBRX, "parallel": parallel}))
    with fake_world(64):
        check(load_config(path, ["global_train_batch_size=64"]), console)
    printed = " ".join(console.export_text().split())
    for part in (
        "layout over 64 ranks strategy fsdp all but experts 2 replicate x 32 shard",
        "experts 2 replicate x 4 shard x 8 expert_parallel",
        "memory of a rank (estimate) parameters 15.",
        "working set",
        "exchange all_to_all_tokens",
    ):
        assert part in printed, printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory of this GPU is known")
def test_check_plans_for_gpus_of_another_machine(settings, tmp_path, caplog):
    """The plan is that for the CPU, but for the backends."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"parallel": {"strategy": "fsdp"}}))

    def planned(device):
        console = Console(file=io.StringIO(), record=True, width=160)
        with fake_world(4):
            check(load_config(path, [f"device={device}"], planned=True), console)
        text = console.export_text()
        return text[text.index("memory of a rank") : text.index("backends")].split()

    assert planned("cuda") == planned("cpu")
    said = [record.getMessage() for record in caplog.records]
    assert sum("the memory of cuda:0 is not known" in text for text in said) == 1
    with pytest.raises(ConfigError, match="torch finds no CUDA GPU here; `tokenyard check --nproc"):
        check(load_config(path, ["device=cuda"], planned=True), Console(file=io.StringIO()))


def test_check_prints_the_bytes_that_an_exchange_sends(settings, tmp_path):
    """DBRX, 8 ranks: a token goes to 3.1 of 8 ranks on average, with 4 weights and ids."""
    path = tmp_path / "config.yaml"
    parallel = {"strategy": "fsdp", "expert_parallel": 8}
    path.write_text(yaml.safe_dump(settings | {"model": DBRX, "parallel": parallel}))
    rows = 7 * (1 - comb(14, 4) / comb(16, 4))  # to other ranks
    width = {"auto": 2 * 6144, "fp8": 6144 + 4 * 48}
    options = {"auto": [], "fp8": ["backends.exchange={name: all_to_all_tokens, precision: fp8}"]}
    for precision, bytes_of_row in width.items():
        console = Console(file=io.StringIO(), record=True, width=160)
        overrides = ["precision=amp_bf16", "global_train_batch_size=8", *options[precision]]
        with fake_world(8):
            check(load_config(path, overrides), console)
        printed = console.export_text()
        sent = 2 * round(rows * (bytes_of_row + 4 * 2 * 4 + 2 * 6144))
        assert f"{sent:,} bytes a token and layer, forward and backward" in printed
        assert ("fewer in FP8" in printed) == (precision == "fp8")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            (12, 8, 1),
            "expert_parallel is 8, which does not divide the 12 ranks of a copy of the model; "
            "these do: 1, 2",
        ),
        (
            (4096, 1, 1),
            "experts.up [16, 21504, 6144] cannot be cut into 4096 equal shards along any "
            "dimension; expert_parallel 2, 4, 8, 16 would do",
        ),
        (
            (100, 2, 1),
            "experts.up [8, 21504, 6144] cannot be cut into 50 equal shards along any dimension; "
            "replicate 25, 50, 100 would do",
        ),
        (
            (64, 1, 3),
            "replicate is 3, which does not divide the 64 ranks; these do: 1, 2, 4",
        ),
    ],
)
def test_impossible_layouts_raise_with_what_would_work(dbrx, layout, message):
    with fake_world(layout[0]), pytest.raises(ConfigError, match=re.escape(message)):
        build_model(dbrx(*layout))


@pytest.mark.parametrize(
    ("shape", "shards", "dim"),
    [
        ((8, 24, 8), 4, 0),
        ((2, 24, 8), 4, 1),
        ((2, 6, 8), 4, 2),
        ((7, 3, 5), 4, 0),
        ((16, 21504, 6144), 9, None),
        ((8, 3, 5), 7, None),
        ((2, 3, 5), 4, None),
    ],
)
def test_experts_are_sharded_along_a_dimension_that_leaves_no_shard_empty(shape, shards, dim):
    assert expert_shard_dim(shape, shards) == dim
    if dim is not None:
        assert len(torch.empty(shape, device="meta").chunk(shards, dim)) == shards


def test_the_working_set_is_what_is_gathered_at_a_time(dbrx):
    """Of DBRX in bfloat16: what is in no block, two blocks, and the gradients of one unit twice."""
    numel = numel_by_part(meta_model(dbrx(1)))
    with fake_world(64):
        strategy, model = build_model(dbrx(64, 8, precision="amp_bf16"))
        working_set = strategy.describe(model).working_set
    experts = numel["experts"] // 8
    gathered = 4 * numel["outside"] + 2 * (4 * numel["dense"] + 2 * experts)
    gradients = max((2 + 2) * experts, (4 + 4) * numel["outside"])
    assert working_set == gathered + gradients


def test_copies_convert_the_shards_of_two_units(dbrx):
    """Float32 shards, into bfloat16. Shards of bfloat16 are gathered from where they are."""
    experts = numel_by_part(meta_model(dbrx(1)))["experts"] // 8
    for precision, converted in (("amp_bf16", 2 * 2 * experts // 8), ("bf16_master", 0)):
        config = dbrx(64, 8, precision=precision)
        with fake_world(64):
            strategy, model = build_model(config)
            narrow = precision == "bf16_master"
            collectives = strategy.describe(model.bfloat16() if narrow else model).working_set
            strategy.transfers = "copies"
            assert strategy.describe(model).working_set == collectives + converted


@pytest.mark.parametrize(
    ("strategy", "count", "gathered"), [("fsdp", 4, True), ("fsdp", 2, False), ("ddp", 2, False)]
)
def test_experts_that_are_not_gathered_are_cast(settings, strategy, count, gathered):
    """Over two ranks of expert parallelism, with float32 weights only."""
    parallel = {"strategy": strategy, "expert_parallel": 2}
    with fake_world(count):
        for precision in ("amp_bf16", "bf16_master"):
            config = read_config(settings | {"parallel": parallel, "precision": precision})
            laid_out, model = build_model(config)
            copies = estimate(config, model, laid_out.describe(model)).copies
            experts = [p for moe in moe_layers(model) for p in moe.experts.parameters()]
            numel = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in experts)
            numel += 0 if gathered else sum(local_part(p).numel() for p in experts)
            assert copies == (2 * numel if precision == "amp_bf16" else 0)


SMALL = {
    "name": "mixtral",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
}


@pytest.mark.parametrize(
    ("strategy", "changes", "loses"),
    [
        ("fsdp", {}, True),
        ("ddp", {}, False),
        ("fsdp", {"global_train_batch_size": 1024, "device_train_microbatch_size": 256}, False),
        ("fsdp", {"model": DBRX, "max_seq_len": 2048}, False),
    ],
)
def test_a_model_that_is_too_small_for_shards(settings, strategy, changes, loses):
    """The times of one H200 and of its host are those of examples/bench/small.yaml."""
    small = {"model": SMALL, "max_seq_len": 512, "global_train_batch_size": 16}
    small |= {"parallel": {"strategy": strategy}, "device_train_microbatch_size": 8} | changes
    config = read_config(settings | small)
    with fake_world(2):
        _, model = build_model(config)
    reason = why_ranks_lose(config.model_copy(update={"device": "cuda:0"}), model, 2)
    assert (reason is not None) == loses
    if loses:
        assert re.search(r"host of each of the 2 ranks about 44 ms, .* in about [34] ms", reason)
        assert "give parallel.strategy ddp" in reason
    assert why_ranks_lose(config, model, 2) is None, "it is for GPUs"


def numel_by_part(model):
    """Return the numel of the experts and the rest of a block, and of what is in no block."""
    block = sum(p.numel() for p in model.blocks[0].parameters())
    experts = sum(p.numel() for p in model.blocks[0].ffn.experts.parameters())
    outside = sum(p.numel() for p in model.parameters()) - block * len(model.blocks)
    return {"experts": experts, "dense": block - experts, "outside": outside}


def test_a_model_on_one_process_gathers_nothing(settings):
    strategy, model = build_model(read_config(settings))
    assert strategy.describe(model).working_set == 0
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model, torch.nn.Module)
