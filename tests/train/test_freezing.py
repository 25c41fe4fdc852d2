"""What is frozen stays as it is, bit by bit, and everything else is trained."""

import pytest
import torch
from rich.console import Console

from tokenyard import ConfigError
from tokenyard_train.build import build_run
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.config import read_config
from tokenyard_train.run import train
from tokenyard_train.step import train_step


def stepped(settings):
    """Return a run after one step, its parameters before, and which had a gradient."""
    run, with_gradient = build_run(read_config(settings), Console(quiet=True)), set()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def note(*_):
        with_gradient.update(name for name, p in run.model.named_parameters() if p.grad is not None)

    run.optimizer.register_step_pre_hook(note)
    train_step(run)
    return run, before, with_gradient


@pytest.mark.parametrize(
    "patterns",
    [["blocks.*.ffn.experts.*"], ["embed.weight", "head.weight"], ["blocks.0.*", "*norm*"], ["*experts.up"], []],
    ids=str,
)
def test_gradients_reach_exactly_what_is_trained(settings, patterns):
    run, before, with_gradient = stepped(settings | {"frozen": patterns})
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert with_gradient == trained
    assert len(trained) < len(before) or not patterns
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(trained)


def test_a_frozen_run_goes_on_and_another_freezing_is_refused(settings):
    frozen = settings | {"frozen": ["*experts*"], "save_interval": "2ba", "autoresume": True}
    train(read_config(frozen | {"max_duration": "2ba"}), Console(quiet=True))
    train(read_config(frozen), Console(quiet=True))
    with pytest.raises(CheckpointError, match=r"frozen is \['\*up'\], but checkpoint .* with \['\*experts\*'\]"):
        train(read_config(frozen | {"frozen": ["*up"]}), Console(quiet=True))


def test_mistakes(settings):
    with pytest.raises(ConfigError, match=r"frozen: 'head\.weigth' matches no parameter \(did you mean 'head\.weight'"):
        build_run(read_config(settings | {"frozen": ["head.weigth"]}), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"frozen: '\*' leave nothing to train"):
        build_run(read_config(settings | {"frozen": ["*"]}), Console(quiet=True))
