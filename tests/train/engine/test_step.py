"""One optimizer step: loss, accumulation, clipping, recomputation, skipped steps and updates."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tokenyard import moe_layers
from tokenyard.tolerance import relative_error
from tokenyard_train.callbacks import Callback
from tokenyard_train.commands.train import train
from tokenyard_train.engine.microbatch import accumulate
from tokenyard_train.engine.nonfinite import NonFiniteError, Skipped
from tokenyard_train.engine.step import train_step

from ..conftest import MODEL

NO_AUXILIARY = MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_loss_weight": 0.0}}


def gradients(run) -> dict[str, torch.Tensor]:
    run.model.double()
    for moe in moe_layers(run.model):
        moe.workload = moe.experts.workload = replace(moe.workload, dtype=torch.float64)
    run.model.train()
    accumulate(run, 0)
    return {name: p.grad for name, p in run.model.named_parameters()}


def test_loss_is_the_mean_over_the_global_batch_plus_the_weighted_auxiliary_losses(build):
    run = build(model=MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_zloss_weight": 0.01}})
    got = gradients(run)
    run.model.zero_grad()
    rows = run.data.train.batch(0, 4)
    output = run.model(rows[:, :-1])
    nats = F.cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten())
    balance = (
        sum(4 / 2 * (b.counts.double() / 96 * b.prob_sum / 96).sum() for b in output.balances) / 2
    )
    z = sum(b.z_sum / 96 for b in output.balances) / 2
    (nats + 0.05 * balance + 0.01 * z).backward()
    for name, parameter in run.model.named_parameters():
        assert relative_error(got[name], parameter.grad) < 1e-12, name


@pytest.mark.parametrize("microbatch", [1, 2])
def test_accumulation_changes_nothing_but_rounding(build, microbatch):
    whole = gradients(build(model=NO_AUXILIARY))
    parts = gradients(
        build(model=NO_AUXILIARY, device_train_microbatch_size=microbatch, save_folder="unused")
    )
    for name in whole:
        assert relative_error(parts[name], whole[name]) < 1e-12, name


def test_counts_are_summed_over_microbatches(build):
    a = train_step(build(), 0).result
    b = train_step(build(device_train_microbatch_size=1), 0).result
    assert a.load == b.load
    assert [sum(layer) for layer in a.load] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("recompute", [True, "selective"])
@pytest.mark.parametrize(
    ("precision", "offload"), [("fp32", False), ("amp_bf16", False), ("amp_bf16", True)]
)
def test_recomputing_activations_changes_nothing(build, recompute, precision, offload):
    jitter = MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_jitter_eps": 0.1}}
    changes = {"model": jitter, "precision": precision, "device_train_microbatch_size": 2}
    plain = build(**changes)
    keys = {"activation_checkpointing": recompute, "activation_cpu_offload": offload}
    recomputed = build(**changes, **keys)
    assert train_step(plain, 0).result == train_step(recomputed, 0).result
    for a, b in zip(plain.model.parameters(), recomputed.model.parameters()):
        assert torch.equal(a, b)


def test_clipping_is_by_the_global_norm(build):
    clipping = {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1e-3}}
    free = build()
    clipped = build(algorithms=clipping)
    norms = [train_step(run, 0).result.grad_norm for run in (free, clipped)]
    assert norms[0] == norms[1] > 1e-3
    for a, b in zip(free.model.parameters(), clipped.model.parameters()):
        # After one step the first moment is the gradient that the optimizer saw, times 1 - beta1.
        seen = [run.optimizer.state[p]["exp_avg"] for run, p in ((free, a), (clipped, b))]
        assert relative_error(seen[1], seen[0] * (1e-3 / norms[0])) < 1e-4


@pytest.mark.parametrize("taken", [True, False])
def test_a_buffer_that_a_router_replaces_stays_the_same_tensor(build, monkeypatch, taken):
    """A CUDA graph reads its memory."""

    def replace_buffer(router, counts):
        router.selection_bias = router.selection_bias + counts

    ffn = MODEL["ffn_config"] | {"moe_bias_update_rate": 0.01}
    run = build(model=MODEL | {"ffn_config": ffn})
    router = run.layers[0].router
    bias = router.selection_bias
    monkeypatch.setattr(type(router), "update", replace_buffer)
    if not taken:
        run.model.norm.register_forward_hook(lambda *args: args[-1] * math.inf)
    assert (train_step(run, 0).skipped is None) == taken
    assert router.selection_bias is bias
    assert bias.any() == taken


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_nonfinite_number_skips_one_step_and_changes_nothing(build, where):
    ffn = MODEL["ffn_config"] | {"moe_bias_update_rate": 0.01}
    run = build(model=MODEL | {"ffn_config": ffn})
    train_step(run, 0)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert any("selection_bias" in name and value.any() for name, value in before.items())
    if where == "loss":
        hook = run.model.norm.register_forward_hook(lambda *args: args[-1] * math.inf)
    else:
        hook = run.model.blocks[0].ffn.experts.up.register_hook(lambda g: g * math.nan)
    skipped = train_step(run, 1).skipped
    assert isinstance(skipped, Skipped)
    assert math.isnan(skipped.loss if where == "loss" else skipped.grad_norm)
    assert math.isfinite(skipped.loss) == (where == "gradient norm")
    after = run.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(p.grad is None for p in run.model.parameters())
    hook.remove()
    assert train_step(run, 2).skipped is None
    assert all(not torch.equal(before[n], v) for n, v in after.items() if "selection_bias" in n)


def test_all_modules_are_in_training_mode(build):
    """Also those that a callback has left in the mode of evaluation."""
    run = build()
    train_step(run, 0)
    run.model.blocks[0].eval()
    train_step(run, 1)
    assert all(module.training for module in run.model.modules())


def test_a_skipped_step_has_no_result(build):
    run = build()
    run.model.norm.register_forward_hook(lambda *args: args[-1] * math.inf)
    with pytest.raises(ValueError, match="no result, since it was not taken"):
        print(train_step(run, 0).result)


def test_flags_are_returned(build):
    assert train_step(build(), 0, flags=(False, True)).flags == [False, True]


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_nonfinite_number_stops_a_run(config, console, where):
    class Break(Callback):
        def batch_end(self, run, record):
            if where == "loss":
                run.setup.model.norm.weight.data[0] = math.inf
            else:
                run.setup.model.blocks[0].ffn.experts.up.register_hook(lambda g: g * math.nan)

    with pytest.raises(
        NonFiniteError, match=rf"the {where} of batch 2 is nan; the step was not taken"
    ):
        train(config(), console, [Break()])


def test_too_many_skipped_steps_in_a_row_stop_the_run(config, console, tmp_path):
    """Each skipped step has a record of valid JSON."""

    class Break(Callback):
        def start(self, run):
            run.setup.model.norm.register_forward_hook(
                lambda *args: args[-1] * math.nan if run.batch >= 2 else None
            )

        def skipped(self, run, record):
            seen.append(record)

    seen = []
    with pytest.raises(
        NonFiniteError, match="loss of batch 5 is nan, and 2 steps before it were skipped; the step"
    ):
        train(config(nonfinite="skip", nonfinite_limit=3), console, [Break()])
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["kind"] for r in records] == ["train", "train", "skipped", "skipped"]
    assert (
        records[-1]
        == {"kind": "skipped", "batch": 4, "loss": "nan", "grad_norm": "nan"}
        == seen[-1]
    )


def test_a_run_that_skips_every_step_ends(config, console):
    class Break(Callback):
        def start(self, run):
            run.setup.model.norm.register_forward_hook(lambda *args: args[-1] * math.nan)

    result = train(
        config(nonfinite="skip", eval_loader=None, max_duration="3ba"), console, [Break()]
    )
    assert math.isnan(result.train_loss)


def test_selection_bias_changes_once_a_step_by_the_global_batch(build):
    ffn = MODEL["ffn_config"] | {"moe_bias_update_rate": 0.01, "moe_score_function": "sigmoid"}
    run = build(
        model=MODEL | {"ffn_config": ffn},
        device_train_microbatch_size=1,
        activation_checkpointing=True,
    )
    result = train_step(run, 0).result
    for moe, load in zip(moe_layers(run.model), result.load):
        want = [0.01 * ((share < 0.25) - (share > 0.25)) for share in load]
        assert moe.router.selection_bias.tolist() == pytest.approx(want)


def test_randomness_depends_only_on_the_step(build):
    jitter = MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_jitter_eps": 0.1}}
    first = build(model=jitter)
    second = build(model=jitter)
    torch.manual_seed(1)
    a = train_step(first, 0).result
    torch.manual_seed(2)
    assert train_step(second, 0).result == a
    assert train_step(second, 1).result.loss != a.loss


def test_amp_differs_from_fp32_by_at_most_one_percent(build):
    plain = train_step(build(), 0).result
    amp = train_step(build(precision="amp_bf16"), 0).result
    assert amp.loss != plain.loss
    assert amp.loss == pytest.approx(plain.loss, rel=0.01)
