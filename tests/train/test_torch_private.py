"""The private names of torch that the trainer uses exist and behave as it expects."""

import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tokenyard_train.torch_private import (
    copy_default_timeout,
    copy_shard_to_host,
    default_timeout,
    flight_record,
    keep_compiler_out_of_optimizers,
    set_nccl_timeouts,
)


@pytest.fixture
def world():
    """The default process group, with one rank and a timeout of 77 seconds."""
    timeout = timedelta(seconds=77)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield timeout
    dist.destroy_process_group()


def test_optimizers_have_the_wrapper_that_torch_marks():
    keep_compiler_out_of_optimizers()
    assert hasattr(torch.optim.Optimizer.zero_grad.__wrapped__, "__dynamo_disable")


def test_a_group_takes_the_timeout_of_the_default_group(world):
    group = dist.new_group(backend="gloo")
    copy_default_timeout(group)
    assert group._get_backend(torch.device("cpu")).options._timeout == world


def test_timeouts_of_nccl_leave_other_backends_alone(world):
    set_nccl_timeouts(timedelta(seconds=5))
    assert default_timeout() == world


def test_collectives_are_recorded_as_json(world):
    """launch/test_watch.py reads a record of some."""
    assert isinstance(json.loads(flight_record()), dict)


def test_dcp_sees_a_host_copy_as_a_shard(world):
    tensor = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (1,)), [Shard(0)])
    shard = copy_shard_to_host("a", tensor)
    tensor.to_local().zero_()
    (item,) = shard.__create_write_items__("a", shard)
    assert item.tensor_data.size == torch.Size([6])
    assert shard.__get_tensor_shard__(item.index).tolist() == list(range(6))
