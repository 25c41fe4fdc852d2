"""Batches on their way to a device."""

import pytest
import torch

from tokenyard import Documents
from tokenyard_train.data.batch import Batch, window_batch


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_does_not_wait_for_a_batch(packed):
    """The windows of text are slices, which are not contiguous."""
    windows = torch.randint(1000, (4, 65))
    batch = window_batch(windows)
    if packed:
        offsets = torch.arange(0, 257, 64, dtype=torch.int32)
        positions = torch.arange(64).repeat(4, 1)
        batch = batch._replace(documents=Documents(positions.int(), positions, offsets, 64))
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = batch.to("cuda:0")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert _on_host(sent.ids, sent.targets) == _on_host(windows[:, :-1], windows[:, 1:])
    if packed:
        assert _on_host(*sent.documents[:3]) == _on_host(*batch.documents[:3])
        assert sent.documents.longest == 64


def test_a_batch_stays_on_the_cpu():
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    sent = batch.to("cpu")
    assert (sent.ids is batch.ids, sent.targets is batch.targets) == (True, True)


def _on_host(*tensors):
    return [tensor.tolist() for tensor in tensors]
