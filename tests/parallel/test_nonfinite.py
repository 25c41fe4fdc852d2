"""A number that is not finite on one rank: all ranks stop, or skip the step, alike."""

import math
import random

import pytest
from harness import fault_runs
from test_training import LAYOUTS, run

STEP, STEPS, ALWAYS = 2, 4, 6


def _injections(count=20):
    """Which layout, rank, number and policy: drawn, but the same every time."""
    draw = random.Random(7)
    layouts = [name for name in LAYOUTS if name != "single"]
    for i in range(count):
        layout = layouts[i % len(layouts)]
        where, value = (
            ("loss", "logits", "experts")[i % 3],
            draw.choice((math.nan, math.inf, -math.inf)),
        )
        yield layout, draw.randrange(LAYOUTS[layout][0]), where, value, ("stop", "skip")[i // 2 % 2]


INJECTIONS = [
    pytest.param(*x, marks=[pytest.mark.full] * (i >= ALWAYS)) for i, x in enumerate(_injections())
]


@pytest.mark.parametrize(("layout", "rank", "where", "value", "policy"), INJECTIONS)
def test_all_ranks_decide_alike_and_keep_their_weights(
    settings, tmp_path, layout, rank, where, value, policy
):
    changes = {"nonfinite": policy, "max_duration": f"{STEPS}ba"}
    digests, missed, said = run(
        fault_runs.spoilt, layout, settings, tmp_path, rank, STEP, where, value, **changes
    )
    if policy == "stop":
        assert f"of batch {STEP + 1} is " in said
        assert len(set(digests)) == len(digests) == STEP + 1
    else:
        assert (missed, said) == ([STEP + 1], "")
        assert digests[STEP + 1] == digests[STEP]
        assert len(set(digests)) == len(digests) - 1 == STEPS
