"""Fixtures of the tests of several ranks, and the path on which they find `harness`."""

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tokenyard.testing import preload

sys.path.insert(0, str(Path(__file__).parent))  # ranks get the path of this process
preload(
    "tokenyard_parallel.exchanges",
    "tokenyard_parallel.strategies",
    "tokenyard_train.bench.commands",
    "tokenyard_train.commands.train",
    "tokenyard_train.records.plots",
    "torch._dynamo",  # FSDP imports it in the first forward pass
)


@pytest.fixture(autouse=True)
def no_process_group():
    """Destroy the process group that a strategy leaves here, so that tests run in any order."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """Return a function that returns the config of `settings`, for fixtures of a wider scope."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"{i} times 3 is {3 * i}, and 7 more is {3 * i + 7}.\n" for i in range(200))
    path.write_text("".join(lines))
    loss = {"moe_loss_weight": 0.05, "moe_zloss_weight": 0.01}
    sizes = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, **loss}
    config = {
        "max_seq_len": 24,
        "model": {"name": "dbrx", "size": "tiny", "d_model": 16, "ffn_config": sizes},
        "train_loader": {"name": "text", "dataset": {"path": str(path)}},
        "eval_loader": {"name": "text", "dataset": {"path": str(path)}},
        "eval_subset_num_batches": 3,
        "algorithms": {"gradient_clipping": {"clipping_threshold": 1.0}},
        "optimizer": {"name": "decoupled_adamw", "lr": 0.01, "weight_decay": 0.001},
        "max_duration": "4ba",
        "eval_interval": "2ba",
        "save_interval": "2ba",
        "global_train_batch_size": 8,
        "device": "cpu",
    }
    return lambda: copy.deepcopy(config)


@pytest.fixture
def settings(small_config):
    """A small training config; a microbatch has four samples over all ranks, in every layout."""
    return small_config()


@pytest.fixture(scope="session")
def reference(small_config, tmp_path_factory):
    """Return the result and the folder of a run of the small config in a layout, trained once."""
    from harness import layout_runs
    from harness.layouts import run

    @functools.cache
    def train(layout):
        folder = tmp_path_factory.mktemp("reference")
        return run(layout_runs.trained, layout, small_config(), folder), folder / layout

    return train
