"""Generation with the KV cache equals generation with full forward passes."""

import torch

from tokenyard_models import Dbrx
from tokenyard_train.engine.sampling import Sampling, sample


def model() -> Dbrx:
    net = Dbrx(
        {"size": "tiny", "d_model": 32, "vocab_size": 61},
        dtype=torch.float64,
        compute_dtype=torch.float64,
    )
    net.init_weights(3)
    return net


def test_greedy_with_the_cache_equals_full_passes():
    net = model()
    ids = torch.randint(0, 60, (3, 5))
    rows = ids.clone()
    for _ in range(12):
        rows = torch.cat((rows, net(rows).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert sample(net, ids.tolist(), Sampling(12, 0, 0)) == rows[:, 5:].tolist()


def test_each_row_stops_at_its_end_token():
    net = model()
    ids = torch.randint(0, 60, (2, 5))
    free = sample(net, ids.tolist(), Sampling(12, 0, 0))
    end = free[0][4]
    cut = [row[: row.index(end)] if end in row else row for row in free]
    assert sample(net, ids.tolist(), Sampling(12, 0, 0, {end})) == cut


def test_frequencies_follow_the_temperature():
    net = model()
    ids = torch.randint(0, 60, (1, 1))
    want = (net(ids).logits[0, -1] / 0.7).softmax(-1)
    drawn = sample(net, ids.expand(4000, 1).tolist(), Sampling(1, 0.7, 5))
    seen = torch.bincount(torch.tensor(drawn).flatten(), minlength=61) / 4000
    assert (seen - want).abs().max() < 0.04


def test_training_mode_is_restored():
    net = model().train()
    sample(net, [[0]], Sampling(1, 0, 0))
    assert net.training
