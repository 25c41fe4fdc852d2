"""Inputs changed at random: a command succeeds with the right result, or says why in a sentence.

Each case is drawn from its kind and its seed. A failure names both, and

    TOKENYARD_FUZZ=configs:123 pytest tests/fuzz

runs that case again. The folder of a case that fails is kept.
"""

import os
import random
import shutil

import pytest

KINDS = ("configs", "runs", "hf", "data", "plugins")
SHORT = 60  # cases of each kind
LONG = 2000
CHUNK = 20  # cases of a test

ONE = os.environ.get("TOKENYARD_FUZZ")


def run_case(kind, name, seed, folder):
    """Run one case; return a sentence if it is wrong."""
    draw = random.Random(f"{name}:{seed}")
    # Deep, so that `..` leads to nothing large.
    inner = folder / str(seed) / "a" / "b"
    inner.mkdir(parents=True)
    done, ended, verdict = kind.run(draw, inner)
    fault = ended.fault() or verdict
    if fault is None:
        shutil.rmtree(folder / str(seed))
        return None
    return f"{name}:{seed} ({done}): {fault}; {ended.codes} in {inner}\n{ended.errors()[-1500:]}"


def run_cases(kind, name, seeds, folder):
    """Run some cases; fail with those that are wrong."""
    faults = [run_case(kind, name, seed, folder) for seed in seeds]
    faults = [fault for fault in faults if fault is not None]
    assert not faults, f"{len(faults)} of {len(seeds)} cases:\n" + "\n".join(faults)


def chunks(count, first=0):
    seeds = range(first, first + count)
    return [seeds[i : i + CHUNK] for i in range(0, count, CHUNK)]


@pytest.mark.skipif(ONE is not None, reason="TOKENYARD_FUZZ names one case")
@pytest.mark.parametrize("seeds", chunks(SHORT), ids=lambda seeds: str(seeds[0]))
@pytest.mark.parametrize("name", KINDS)
def test_changed_inputs_are_refused_or_harmless(name, seeds, kind, tmp_path):
    run_cases(kind(name), name, seeds, tmp_path)


@pytest.mark.full
@pytest.mark.skipif(ONE is not None, reason="TOKENYARD_FUZZ names one case")
@pytest.mark.parametrize("seeds", chunks(LONG, SHORT), ids=lambda seeds: str(seeds[0]))
@pytest.mark.parametrize("name", KINDS)
def test_many_changed_inputs_are_refused_or_harmless(name, seeds, kind, tmp_path):
    run_cases(kind(name), name, seeds, tmp_path)


@pytest.mark.skipif(ONE is None, reason="TOKENYARD_FUZZ names no case")
def test_one_case(kind, tmp_path):
    name, _, seed = ONE.partition(":")
    run_cases(kind(name), name, [int(seed)], tmp_path)
