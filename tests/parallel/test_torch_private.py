"""The private names of torch that the package uses exist, and do what it relies on."""

from datetime import timedelta

import torch
import torch.distributed as dist
from harness.layout_runs import group_timeouts, send_own_rank

from tokenyard.testing import ranks
from tokenyard_parallel import fake_world


def test_a_fake_world_has_collectives_that_do_nothing():
    with fake_world(3):
        assert dist.get_world_size() == 3
        x = torch.ones(2)
        dist.all_reduce(x)
        assert x.tolist() == [1, 1]
    assert not dist.is_initialized()


def test_every_group_of_a_mesh_has_the_timeout_of_the_strategy():
    for timeouts in ranks(2).run(group_timeouts, 123.0):
        assert set(timeouts) == {timedelta(seconds=123)}


def test_an_all_to_all_sends_rows_to_each_rank():
    assert ranks(2).run(send_own_rank) == [[0, 1], [0, 0, 1, 1]]
