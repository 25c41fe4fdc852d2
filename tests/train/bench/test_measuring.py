"""Clocks, spreads, memory and the comparison of files."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from tokenyard import ConfigError
from tokenyard_train.bench.compare import compare, print_changes, standard_error
from tokenyard_train.bench.memory import peak_bytes, saved_bytes
from tokenyard_train.bench.shapes import SHAPES, parse_shape, parse_shapes
from tokenyard_train.bench.timing import Spread, measure
from tokenyard_train.records.results import read_results, write_results


class Steps:
    """A clock on which every stamp is one later than the one before."""

    def __init__(self):
        self.ticks = itertools.count()
        self.prepared = 0

    def prepare(self, call):
        self.prepared += 1

    def stamp(self):
        return next(self.ticks)

    def between(self, stamps):
        return [float(stamp - stamps[0]) for stamp in stamps[1:]]


def test_works_take_turns_and_stages_hand_on_their_results():
    calls, clock = [], Steps()
    works = {
        "one": (
            lambda start: calls.append(("one", start)) or 5,
            lambda got: calls.append(("end", got)),
        ),
        "two": (lambda start: calls.append(("two", start)),),
    }
    spreads = measure(works, clock, repetitions=3, warmup=1)
    assert all(
        calls[at + 1] == ("end", 5) for at, call in enumerate(calls) if call == ("one", None)
    )
    begun = [name for name, _ in calls if name != "end"]
    rounds = [begun[at : at + 2] for at in range(0, 8, 2)]
    assert all(sorted(each) == ["one", "two"] for each in rounds)
    assert rounds.count(["one", "two"]) in (1, 2, 3), "each round has an order of its own"
    assert spreads == {"one": [Spread(1, 1, 1, 3), Spread(2, 2, 2, 3)], "two": [Spread(1, 1, 1, 3)]}
    assert clock.prepared == 8


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    x, w = torch.randn(100, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x @ w) * (x @ w).detach(), [w]) == 4 * (
        1000 + 1000
    )  # x, and the detached factor
    assert saved_bytes(lambda: x @ w, [w, x]) == 0


def test_peak_bytes_sees_what_is_freed_again():
    def work(_):
        torch.empty(1 << 20, dtype=torch.float64).sum()
        return torch.ones(1 << 10)

    assert 8 << 20 <= peak_bytes((work,), torch.device("cpu")) < 9 << 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "dbrxx",
            r"--shape 'dbrxx' is unknown \(did you mean 'dbrx'\?\); give T,D,F,E,K or one of: mixtral, dbrx",
        ),
        ("1,2,3", r"--shape '1,2,3' is not five whole numbers T,D,F,E,K"),
        ("8,8,a,8,2", r"is not five whole numbers"),
        ("0,8,8,8,2", r"has T = 0; it must be at least 1"),
    ],
)
def test_a_bad_shape_is_one_sentence(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_shape(text)


def test_all_shapes_are_those_of_the_machine():
    assert [shape.name for shape in parse_shapes(["all", "dbrx"], gpu=True)] == [
        n for n in SHAPES if n != "cpu"
    ]
    assert [shape.name for shape in parse_shapes(["all"], gpu=False)] == ["cpu"]


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


def test_only_changes_beyond_the_noise_are_told():
    changes, alone = compare(file(10, 10, 10), file(10.05, 12, 8, 4))
    assert [c.verdict for c in changes] == ["same", "slower", "faster"]
    assert changes[1].what == "dbrx, bf16, natural, b, step"
    assert alone == ["only after: dbrx, bf16, natural, d, step"]
    console = Console(record=True, width=120, file=io.StringIO())
    print_changes(changes, alone, console)
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


def test_results_are_read_back(tmp_path):
    path = write_results(tmp_path / "new", "layer", {"kind": "layer", "records": []})
    assert read_results(path) == {"format": 1, "kind": "layer", "records": []}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not JSON"),
        (json.dumps([]), "is not a benchmark file of format 1"),
        (json.dumps({"format": 2, "records": []}), "is not a benchmark file of format 1"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, said):
    path = tmp_path / "layer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_results(path)
