"""Frozen parameters keep their bits, and all other parameters are trained."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from tokenyard import ConfigError, count_parameters
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine.setup import build_setup
from tokenyard_train.engine.step import train_step
from tokenyard_train.engine.trainable import describe_trainable

from ..conftest import MODEL


def stepped(settings):
    """Return a run after one step, its initial parameters, and the names that had a gradient."""
    run = build_setup(read_config(settings), Console(quiet=True))
    with_gradient = set()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def note(*_):
        with_gradient.update(name for name, p in run.model.named_parameters() if p.grad is not None)

    run.optimizer.register_step_pre_hook(note)
    train_step(run, 0)
    return run, before, with_gradient


@pytest.mark.parametrize(
    "patterns",
    [
        ["blocks.*.ffn.experts.*"],
        ["embed.weight", "head.weight"],
        ["blocks.0.*", "*norm*"],
        ["*experts.up"],
        [],
    ],
    ids=str,
)
def test_gradients_reach_exactly_the_trained_parameters(settings, patterns):
    run, before, with_gradient = stepped(settings | {"frozen": patterns})
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert with_gradient == trained
    assert len(trained) < len(before) or not patterns
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(trained)


def test_a_frozen_run_resumes_only_with_the_same_patterns(settings):
    frozen = settings | {"frozen": ["*experts*"], "save_interval": "2ba", "autoresume": True}
    train(read_config(frozen | {"max_duration": "2ba"}), Console(quiet=True))
    train(read_config(frozen), Console(quiet=True))
    with pytest.raises(
        CheckpointError, match=r"frozen is \['\*up'\], but checkpoint .* with \['\*experts\*'\]"
    ):
        train(read_config(frozen | {"frozen": ["*up"]}), Console(quiet=True))


@pytest.mark.parametrize(
    ("also", "more"), [([], 0), (["*norm*", "*router*"], 2 + 2 * 2 + 1)], ids=str
)
def test_only_adapters_and_train_also_are_trained(settings, also, more):
    """There are two layers with four adapted weights each, five norms and two routers."""
    run, before, with_gradient = stepped(settings | {"lora": {"rank": 2, "train_also": also}})
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert with_gradient == trained
    assert sum(".adapter." in name for name in trained) == 2 * 8
    assert len(trained) == 2 * 8 + more
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_a_run_with_adapters_starts_from_a_run_without_and_resumes(settings, tmp_path):
    train(read_config(settings | {"max_duration": "2ba"}), Console(quiet=True))
    tuned = settings | {
        "lora": {"rank": 2},
        "load_path": settings["save_folder"],
        "save_folder": str(tmp_path / "b"),
    }
    tuned |= {"save_interval": "2ba", "autoresume": True}
    train(read_config(tuned | {"max_duration": "2ba"}), Console(quiet=True))
    train(read_config(tuned), Console(quiet=True))
    folders = (Path(settings["save_folder"]), tmp_path / "b")
    base, adapted = (dict(load_trained(folder).model.named_parameters()) for folder in folders)
    assert all(torch.equal(value, adapted[name]) for name, value in base.items())
    assert any(value.any() for name, value in adapted.items() if name.endswith("adapter.up_b"))


def test_mistakes(settings):
    with pytest.raises(ConfigError, match=r"lora\.train_also: 'norms' matches no parameter"):
        build_setup(
            read_config(settings | {"lora": {"train_also": ["norms"]}}), Console(quiet=True)
        )
    with pytest.raises(
        ConfigError,
        match=r"frozen: 'head\.weigth' matches no parameter \(did you mean 'head\.weight'",
    ):
        build_setup(read_config(settings | {"frozen": ["head.weigth"]}), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"frozen: '\*' leave nothing to train"):
        build_setup(read_config(settings | {"frozen": ["*"]}), Console(quiet=True))


def test_what_lies_past_the_width_of_an_expert_does_not_count(build):
    ffn = {"ffn_hidden_size": 128, "moe_ffn_hidden_sizes": [64, 128, 128, 64]}
    model = build(model=MODEL | {"ffn_config": MODEL["ffn_config"] | ffn}).model
    total = count_parameters(model).total
    assert describe_trainable(model) == f"{total:,} of {total:,} parameters"
