"""A non-finite number on one rank: all ranks stop, or all skip the step."""

import math
import random

import pytest
from harness import fault_runs
from harness.fault_runs import BadNumber
from harness.layouts import LAYOUTS, PARALLEL_LAYOUTS, run

BATCH = 2  # the steps before the bad number
STEPS = 4
SHORT = 6  # cases of every run; the others are `full`


def draw_cases(count=20):
    """Draw layout, rank, target, value and policy, the same every time."""
    draw = random.Random(7)
    for i in range(count):
        layout = PARALLEL_LAYOUTS[i % len(PARALLEL_LAYOUTS)]
        value = draw.choice((math.nan, math.inf, -math.inf))
        rank = draw.randrange(LAYOUTS[layout][0])
        target = ("loss", "norm", "experts")[i % 3]
        yield layout, BadNumber(rank, BATCH, target, value), ("stop", "skip")[i // 2 % 2]


def parameters():
    for i, (layout, number, policy) in enumerate(draw_cases()):
        name = f"{layout}-{number.rank}-{number.target}-{number.value}-{policy}"
        marks = [pytest.mark.full] * (i >= SHORT)
        yield pytest.param(layout, number, policy, id=name, marks=marks)


@pytest.mark.parametrize(("layout", "number", "policy"), list(parameters()))
def test_all_ranks_decide_alike_and_keep_their_weights(settings, tmp_path, layout, number, policy):
    changes = {"nonfinite": policy, "max_duration": f"{STEPS}ba"}
    digests, skipped, message = run(
        fault_runs.train_with_bad_number, layout, settings, tmp_path, number, **changes
    )
    if policy == "stop":
        assert f"of batch {BATCH + 1} is " in message
        assert len(set(digests)) == len(digests) == BATCH + 1
    else:
        assert (skipped, message) == ([BATCH + 1], "")
        assert digests[BATCH + 1] == digests[BATCH]
        assert len(set(digests)) == len(digests) - 1 == STEPS
