"""`ddp` keeps plain parameters, and sums the gradients of each microbatch over ranks."""

import pytest
import torch
from harness import layout_runs as runs
from harness import sum_runs
from harness.layouts import run

from tokenyard.testing import ranks
from tokenyard_parallel.strategies import _packed_gradients


def test_a_microbatch_has_one_sum_of_gradients(settings, tmp_path):
    """Beside it are the counts of all layers, and the loss of the batch."""
    changes = {"global_train_batch_size": 4, "device_train_microbatch_size": 1}
    counts, gradients, *others = run(runs.sums_of_a_step, "ddp-2", settings, tmp_path, **changes)
    assert counts < gradients
    assert others == [counts, gradients, 1]


def test_sums_begin_while_the_backward_pass_goes_on(settings, tmp_path):
    """All numbers are summed once, and those of the embedding come last."""
    changes = {"global_train_batch_size": 2, "device_train_microbatch_size": 1}
    _, whole, _ = run(runs.sums_of_a_step, "ddp-2", settings, tmp_path, **changes)
    _, *early, last, _ = run(runs.sums_of_a_step, "ddp-2", settings, tmp_path, 1000, **changes)
    assert len(early) > 2
    assert all(numbers < 0 for numbers in early)
    assert last > 0
    assert whole <= last - sum(early) < whole + 2 * (len(early) + 1)  # padded for two ranks


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("model", [sum_runs.Positions, sum_runs.Recomputed])
def test_every_gradient_of_a_backward_pass_is_summed_once(model, early):
    """Although the rest of it reads the same memory, or builds the graph of a parameter anew."""
    for plain, summed in ranks(2).run(sum_runs.gradients, model, sum_runs.output_loss, early):
        assert plain.keys() == summed.keys()
        for name in plain:
            torch.testing.assert_close(summed[name], 2 * plain[name], msg=name)


def test_a_gradient_after_the_sum_is_an_error():
    """It would be that of one rank. Before the sum, it is summed with the others."""
    assert ranks(2).run(sum_runs.shared_recompute, 1 << 23) == ["4 of 4"] * 2
    for error in ranks(2).run(sum_runs.shared_recompute, 1):
        assert error.startswith("head.weight gets another gradient from a recompute")


@pytest.mark.parametrize("early", [False, True])
def test_a_backward_pass_from_elsewhere_than_an_output_sums_nothing(early):
    calls = sum_runs.Positions, sum_runs.weight_loss, early
    for plain, local in ranks(2).run(sum_runs.gradients, *calls):
        assert plain.keys() == local.keys() == {"head.weight"}
        assert torch.equal(local["head.weight"], plain["head.weight"])


def test_16_bit_gradients_are_summed_in_float32_and_rounded_once():
    for sums, expected in ranks(2).run(runs.narrow_sums):
        assert sums == expected


def test_packed_gradients_are_aligned_copies():
    """Kernels read 16 bytes at once, and collectives need equal parts for all ranks."""
    gradients = [torch.randn(size) for size in ((3,), (2, 5), (1,), (4,))]
    packed = _packed_gradients.PackedGradients(gradients, ranks=5)
    assert packed.flat.numel() == 25
    assert all(part.data_ptr() % 16 == 0 for part in packed.parts)
    assert all(torch.equal(part, each) for part, each in zip(packed.parts, gradients))


def test_a_bucket_has_a_limit_that_only_one_tensor_exceeds(monkeypatch):
    monkeypatch.setattr(_packed_gradients, "BUCKET", 5)
    tensors = [torch.empty(size) for size in (2, 3, 1, 9, 4, 1)]
    sizes = [[t.numel() for t in bucket] for bucket in _packed_gradients.buckets(tensors)]
    assert sizes == [[2, 3], [1], [9], [4, 1]]
    assert list(_packed_gradients.buckets([])) == []
