"""Only the loop changes the position of a run. The setup is frozen."""

import ast
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import tokenyard_train
from tokenyard_train.config.duration import Span
from tokenyard_train.engine.state import Position, Run

SOURCE = Path(tokenyard_train.__file__).parent


def assigned(path: Path) -> set[str]:
    """Return the names of all attributes that a module assigns."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            names |= {t.attr for t in targets if isinstance(t, ast.Attribute)}
    return names


def test_only_steps_change_the_position():
    writers = {path.name for path in SOURCE.rglob("*.py") if "position" in assigned(path)}
    assert writers == {"steps.py"}


def test_setup_and_position_are_frozen(build):
    with pytest.raises(FrozenInstanceError):
        build().batches = 3
    with pytest.raises(FrozenInstanceError):
        Position().batch = 3


def test_a_run_ends_at_its_last_batch_or_on_request(build):
    run = Run(build(), metrics=None, position=Position(batch=5))
    assert not run.finished
    run.stop_training()
    assert run.finished
    assert Run(build(save_folder="other"), metrics=None, position=Position(batch=6)).finished


def test_intervals_are_due_at_their_multiples(build):
    setup = build()
    due = [Run(setup, None, Position(batch)).due(Span(2, "ba")) for batch in range(1, 5)]
    assert due == [False, True, False, True]
    assert not Run(setup, None, Position(1)).due(None)
