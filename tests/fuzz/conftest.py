"""Fixtures of the fuzzer, and the path on which its modules find each other."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def server():
    """The process that cases are forked from."""
    from processes import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def kind(server, tmp_path_factory):
    """Return a function that makes a kind of cases by its name, once."""
    from kinds import KINDS

    folder = tmp_path_factory.mktemp("inputs")
    return functools.cache(lambda name: KINDS[name](server, folder / name))
