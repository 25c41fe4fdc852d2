"""A Hugging Face folder goes straight into shards."""

import pytest
from harness import layout_runs as runs
from test_training import LAYOUTS

from tokenyard.testing import ranks
from tokenyard_models import Mixtral, to_hf

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 257, "max_seq_len": 64}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("published") / "mixtral", Mixtral(SIZES)
    model.init_weights(3)
    to_hf(model, folder, shard_bytes=9000)
    return folder


@pytest.mark.parametrize("layout", ["ddp-2", "fsdp-2", "fsdp-2-ep2"])
def test_a_rank_reads_what_it_holds_and_no_more(settings, published, tmp_path, layout):
    """Byte for byte, in tensors of at most its share of the largest; and all together have what one process has."""
    changes = {"load_path": f"hf://{published}", "device_train_microbatch_size": 2}
    given = {k: v for k, v in settings.items() if k != "model"} | changes
    alone = runs.started(given | {"save_folder": str(tmp_path / "one")})
    count, parallel = LAYOUTS[layout]
    found = ranks(count).run(
        runs.started, given | {"parallel": parallel, "save_folder": str(tmp_path / layout)}
    )
    assert {each.digest for each in found} == {alone.digest}
    for each in found:
        assert each.total == each.held
        assert each.largest <= alone.largest
    assert alone.total == alone.held
    if layout != "ddp-2":
        assert max(each.total for each in found) < 0.6 * alone.total
