"""Scores of continuations in padded batches equal those of each request alone, in float64."""

import pytest
import torch

from tokenyard import ConfigError
from tokenyard_models import Mixtral
from tokenyard_train.engine import scoring
from tokenyard_train.engine.scoring import Request, score


@pytest.fixture(scope="module")
def model():
    net = Mixtral(
        {"size": "tiny", "hidden_size": 32, "vocab_size": 61, "max_seq_len": 24},
        dtype=torch.float64,
        compute_dtype=torch.float64,
    )
    net.init_weights(3)
    return net.eval()


def drawn(sizes):
    return [Request(*(torch.randint(0, 61, (n,)).tolist() for n in pair)) for pair in sizes]


def greedy_request(model):
    """A request whose continuation greedy decoding gives."""
    ids = drawn([(5, 1)])[0].context
    rows = torch.tensor([ids])
    for _ in range(3):
        rows = torch.cat((rows, model(rows).logits[:, -1:].argmax(-1)), 1)
    return Request(ids, rows[0, 5:].tolist())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("packs", [True, False])
def test_each_score_is_that_of_the_request_alone(model, batch_size, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(scoring, "why_no_documents", lambda model: "it reads no documents")
    requests = drawn([(3, 2), (9, 4), (1, 1), (40, 3), (1, 24), (20, 5), (3, 2)])
    requests.append(greedy_request(model))
    scores = score(model, requests, batch_size)
    for request, got in zip(requests, scores, strict=True):
        ids = torch.tensor([*request.context, *request.continuation])[-25:]  # the model's window
        logits = model(ids[:-1].unsqueeze(0)).logits[0].log_softmax(-1)
        logits = logits[-len(request.continuation) :]
        want = logits.gather(1, torch.tensor(request.continuation).unsqueeze(1)).sum()
        assert got.nats == pytest.approx(want.item(), rel=1e-5)
        assert got.greedy == (logits.argmax(-1).tolist() == list(request.continuation))
    assert scores[-1].greedy
    assert not all(each.greedy for each in scores)


def test_a_continuation_without_room_is_refused(model):
    with pytest.raises(ConfigError, match=r"a continuation has 25 tokens, and .*max_seq_len is 24"):
        score(model, drawn([(1, 25)]), 2)
