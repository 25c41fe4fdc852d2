"""What ranks run for the test of a sharded checkpoint of Composer."""

from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def save(tensors: dict[str, torch.Tensor], folder: Path, integrations: dict) -> None:
    """Save a model's tensors, sharded by rows over all ranks, as Composer's trainer does.

    Composer also saves optimizer states, and objects that only its own classes can read.
    """
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = {f"model.{name}": distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}
    moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in model.items()}
    state = {
        "model": model,
        "optimizers": {"DecoupledAdamW": {"state": moments, "param_groups": [{"lr": 1e-3}]}},
        "integrations": integrations,
        "timestamp": {"Timestamp": {"batch": 9}},
        "seed": 17,
    }
    checkpoint.save(
        {"state": state, "rng": [{"python": (3, (1, 2), None)}]},
        storage_writer=checkpoint.FileSystemWriter(folder),
        planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
    )
