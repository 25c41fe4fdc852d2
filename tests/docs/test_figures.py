"""Figures on README and home stand in the benchmarks, which follow from the files beside them."""

import json
import re

import pytest
from blocks import ROOT
from speedups import relative_speeds

BENCHMARKS = ROOT / "docs" / "benchmarks"
SUMMARY = (BENCHMARKS / "README.md").read_text()
README = (ROOT / "README.md").read_text()
HOME = (ROOT / "docs" / "index.md").read_text()
GIB = 2**30


def figures(text):
    """Return the numbers of a text that are not parts of names."""
    return set(re.findall(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?", text))


def records(name):
    content = json.loads((BENCHMARKS / name).read_text())
    return {record["contestant"]: record for record in content["records"]}


def test_readme_and_home_have_the_same_figures():
    table = README[README.index("| 1.58x") : README.index("<img", 100)]
    tiles = HOME[HOME.index("* **1.58x") : HOME.index("</div>", HOME.index("* **1.58x"))]
    assert len(figures(table)) > 6
    assert figures(table) == figures(tiles)


def test_figures_of_readme_and_home_stand_in_the_benchmarks():
    rounded = {f"{float(number.replace(',', '')):.0f}" for number in figures(SUMMARY)}
    table = README[README.index("| 1.58x") : README.index("<img", 100)]
    assert figures(table) <= figures(SUMMARY) | rounded


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("h200/step-qwen.json", "Qwen3-30B's shape, 4 layers"),
        ("h200/step-mixtral.json", "Mixtral's shape, 2 layers"),
        ("h200/step-dbrx.json", "DBRX's shape, 1 layer"),
        ("h200/step-small.json", "Small, 54 million parameters"),
    ],
)
def test_steps_are_those_of_the_files(name, row):
    entrants = records(name)
    cells = [f"{entrants['tokenyard']['tokens_per_s']:,.0f}"]
    cells.append(f"{entrants['tokenyard']['flops_per_s'] / 1e12:.0f}")
    for peer in ("transformers-grouped_mm", "transformers-tokenyard"):
        run = entrants.get(peer)
        cells.append(f"{run['tokens_per_s']:,.0f}" if run else "not run")
    assert f"| {row} | {' | '.join(cells)} |" in SUMMARY


def test_speed_and_memory_inside_transformers_are_those_of_the_file():
    entrants = records("h100/train-inside-bf16.json")
    ours = entrants["transformers-tokenyard"]
    theirs = entrants["transformers-grouped_mm"]
    speedup = ours["tokens_per_s"] / theirs["tokens_per_s"]
    memory = f"{ours['peak_bytes'] / GIB:.1f} instead of {theirs['peak_bytes'] / GIB:.1f}"
    assert f"{speedup:.2f}x | {memory} |" in SUMMARY


def test_the_picture_is_described_by_its_figures():
    content = json.loads((BENCHMARKS / "h200" / "layer-peers.json").read_text())
    for shape in ("qwen3-30b", "dbrx"):
        ours = relative_speeds(content["records"], shape)["tokenyard"]
        assert f"{ours:.2f} times" in README
