"""Weights of a Hugging Face folder are read straight into shards."""

import pytest
from harness import layout_runs as runs
from harness.layouts import run

from tokenyard.testing import ranks
from tokenyard_models import Mixtral, to_hf

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 257,
    "max_seq_len": 64,
}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "mixtral"
    model = Mixtral(SIZES)
    model.init_weights(3)
    to_hf(model, folder, shard_bytes=9000)
    return folder


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [
        ("ddp-2", {"strategy": "ddp"}),
        ("fsdp-2", {"strategy": "fsdp"}),
        ("fsdp-2-ep2", {"strategy": "fsdp", "expert_parallel": 2}),
    ],
)
def test_a_rank_reads_its_shards_and_no_more(settings, hf_folder, tmp_path, layout, parallel):
    """Byte for byte; no read exceeds the largest read of one process."""
    del settings["model"]
    settings |= {"load_path": f"hf://{hf_folder}", "device_train_microbatch_size": 2}
    settings |= {"tokenizer": {"name": "bytes"}}
    single = run(runs.read_hf, "single", settings, tmp_path)
    config = settings | {"parallel": parallel, "save_folder": str(tmp_path / layout)}
    reads = ranks(2).run(runs.read_hf, config)
    assert {read.digest for read in reads} == {single.digest}
    assert single.total == single.held
    for read in reads:
        assert read.total == read.held
        assert read.largest <= single.largest
    if layout != "ddp-2":
        assert max(read.total for read in reads) < 0.6 * single.total
