"""A thousand steps and more with skewed routing: no rank waits for ever, and memory does not grow."""

import pytest
from harness.equality import Layout
from harness.soak import soak

from tokenyard.testing import ranks

LAYOUTS = [Layout("fsdp", 2, 2, "all_to_all"), Layout("fsdp", 2, 2, "all_to_all_tokens", chunks=2)]


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_cpus(layout):
    steady(layout, 1000, "cpu")


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_gpus(layout):
    steady(layout, 1000, "cuda")


def steady(layout, steps, device):
    """Compare what is held after a tenth of the steps with what is held after all."""
    found = ranks(2, device).run(soak, layout, steps, device)
    assert found[0].norm == found[1].norm > 0
    for each in found:
        print(f"\n{layout} on {device}: {each}, grown by {each.late / each.early - 1:.2%}")
        assert each.busiest > 2
        assert each.late <= 1.01 * each.early
