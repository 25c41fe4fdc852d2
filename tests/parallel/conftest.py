"""Shared by the tests of several ranks; tests and the ranks that they start can import `harness`."""

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_process_group():
    """Destroy the process group that a strategy leaves in the test process, so that tests can run in any order."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def settings(tmp_path):
    """A small training config whose microbatches hold four samples over all ranks, in every layout."""
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"{i} times 3 is {3 * i}, and 7 more is {3 * i + 7}.\n" for i in range(200))
    )
    loss = {"moe_loss_weight": 0.05, "moe_zloss_weight": 0.01}
    sizes = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, **loss}
    return {
        "max_seq_len": 24,
        "model": {"name": "dbrx", "size": "tiny", "d_model": 16, "ffn_config": sizes},
        "train_loader": {"name": "text", "dataset": {"path": str(text)}},
        "eval_loader": {"name": "text", "dataset": {"path": str(text)}},
        "eval_subset_num_batches": 3,
        "algorithms": {"gradient_clipping": {"clipping_threshold": 1.0}},
        "optimizer": {"name": "decoupled_adamw", "lr": 0.01, "weight_decay": 0.001},
        "max_duration": "4ba",
        "eval_interval": "2ba",
        "save_interval": "2ba",
        "global_train_batch_size": 8,
        "device": "cpu",
    }
