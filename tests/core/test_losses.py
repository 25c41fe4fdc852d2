"""The auxiliary losses equal their formulas, computed slot by slot."""

import pytest
import torch

from tokenyard import (
    AuxiliaryLoss,
    Balance,
    ConfigError,
    MoE,
    Workload,
    load_balancing_loss,
    z_loss,
)

T = 40
E = 6
K = 2
LAYERS = 3


def _layers() -> list[tuple[torch.Tensor, torch.Tensor]]:
    logits = [torch.randn(T, E, dtype=torch.float64) for _ in range(LAYERS)]
    return [(x, x.topk(K).indices) for x in logits]


def _balance(logits: torch.Tensor, ids: torch.Tensor) -> Balance:
    counts = torch.bincount(ids.flatten(), minlength=E)
    return Balance(
        counts, torch.tensor(0), logits.softmax(-1).sum(0), logits.logsumexp(-1).square().sum()
    )


def test_megablocks_convention_is_the_mean_over_layers():
    layers = _layers()
    want = 0.0
    for logits, ids in layers:
        share = [ids.flatten().tolist().count(e) / (T * K) for e in range(E)]
        want += (
            E * sum(share[e] * logits.softmax(-1)[:, e].mean().item() for e in range(E)) / LAYERS
        )
    got = load_balancing_loss([_balance(*layer) for layer in layers], T, K)
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_hf_convention_pools_over_layers():
    layers = _layers()
    logits, ids = (torch.cat(parts) for parts in zip(*layers))
    chosen = torch.nn.functional.one_hot(ids, E).double()  # [L*T, K, E]
    want = E * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
    got = load_balancing_loss([_balance(*layer) for layer in layers], T, K, "hf")
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_balanced_routing_scores_one_and_k():
    tokens = 3 * E
    even = Balance(
        torch.full((E,), tokens * K // E),
        torch.tensor(0),
        torch.full((E,), tokens / E),
        torch.tensor(0.0),
    )
    assert load_balancing_loss([even], tokens, K).item() == pytest.approx(1)
    assert load_balancing_loss([even], tokens, K, "hf").item() == pytest.approx(K)


def test_opposite_imbalances_cancel_only_in_hf_pooling():
    def to_one(e: int) -> Balance:
        counts = torch.zeros(2, dtype=torch.int64)
        counts[e] = T
        probs = torch.zeros(2)
        probs[e] = T
        return Balance(counts, torch.tensor(0), probs, torch.tensor(0.0))

    layers = [to_one(0), to_one(1)]
    assert load_balancing_loss(layers, T, 1).item() == pytest.approx(2)
    assert load_balancing_loss(layers, T, 1, "hf").item() == pytest.approx(1)


def test_z_loss_is_the_mean_square_of_logsumexp():
    layers = _layers()
    want = torch.stack([logits.logsumexp(-1).square().mean() for logits, _ in layers]).mean()
    assert z_loss([_balance(*layer) for layer in layers], T).item() == pytest.approx(
        want.item(), rel=1e-12
    )


def test_balances_add_up_over_microbatches():
    (logits, ids), *_ = _layers()
    parts = [_balance(logits[a:b], ids[a:b]) for a, b in ((0, 13), (13, T))]
    summed = Balance(*(sum(fields) for fields in zip(*parts)))
    whole = _balance(logits, ids)
    assert load_balancing_loss([summed], T, K).item() == pytest.approx(
        load_balancing_loss([whole], T, K).item()
    )


def test_the_gradient_pushes_tokens_from_busy_experts_to_idle_ones():
    moe = MoE(Workload(8, 8, 4, 1, dtype=torch.float64), dtype=torch.float64)
    _, routing = moe(torch.randn(256, 8, dtype=torch.float64))
    logits = routing.logits.detach().requires_grad_()
    balance = moe.router.balance(routing._replace(logits=logits))
    (gradient,) = torch.autograd.grad(load_balancing_loss([balance], 256, 1), logits)
    assert gradient[:, balance.counts.argmax()].sum() > 0
    assert gradient[:, balance.counts.argmin()].sum() < 0


def test_weights_are_applied_and_nothing_is_added_without_layers():
    balances = [_balance(*layer) for layer in _layers()]
    total = AuxiliaryLoss(0.05, 0.001, "hf")(balances, T, K)
    want = 0.05 * load_balancing_loss(balances, T, K, "hf") + 0.001 * z_loss(balances, T)
    assert total.item() == pytest.approx(want.item())
    assert AuxiliaryLoss(0.05)([], T, K) == 0.0
    assert AuxiliaryLoss()(balances, T, K) == 0.0


def test_unknown_convention_is_named():
    with pytest.raises(
        ConfigError, match="convention 'hugging' is unknown; known are: megablocks, hf"
    ):
        AuxiliaryLoss(convention="hugging")
