"""`bench compare`: which changes exceed the noise."""

import io

import pytest
import torch
from rich.console import Console

from tokenyard import ConfigError
from tokenyard.measure.timing import Spread
from tokenyard_bench.compare import compare, standard_error
from tokenyard_bench.tables.changes import print_changes


def file(*times: float, noise: float = 0.1, kind: str = "layer"):
    shape = {"name": "dbrx"}
    return {
        "format": 1,
        "kind": kind,
        "records": [
            {
                "shape": shape,
                "dtype": "bf16",
                "routing": "natural",
                "contestant": name,
                "note": None,
            }
            | {"step_ms": Spread(t, t - noise, t + noise, 20)._asdict()}
            for name, t in zip("abcd", times)
        ],
    }


def test_only_changes_beyond_the_noise_are_printed():
    changes, unmatched = compare(file(10, 10, 10), file(10.05, 12, 8, 4))
    assert [c.verdict for c in changes] == ["same", "slower", "faster"]
    assert changes[1].what == "dbrx, bf16, natural, b, step"
    assert unmatched == ["only after: dbrx, bf16, natural, d, step"]
    console = Console(record=True, width=120, file=io.StringIO())
    print_changes(changes, unmatched, console)
    assert "1 of 3 times did not change beyond the noise" in console.export_text()


def test_noise_grows_with_the_quartiles():
    noisy = compare(file(10, noise=2), file(11, noise=2))[0][0]
    assert noisy.verdict == "same"
    assert compare(file(10, noise=0.1), file(11, noise=0.1))[0][0].verdict == "slower"


def test_the_standard_error_of_a_median_is_that_of_normal_samples():
    torch.manual_seed(0)
    draws = torch.randn(2000, 101).mul(3)
    medians = draws.median(dim=1).values
    estimates = [standard_error(Spread.of(row.tolist())) for row in draws[:200]]
    assert sum(estimates) / len(estimates) == pytest.approx(medians.std().item(), rel=0.1)


def test_files_of_two_kinds_do_not_compare():
    with pytest.raises(
        ConfigError, match=r"one file holds bench layer, the other bench train; give two of a kind"
    ):
        compare(file(1), file(1, kind="train"))
