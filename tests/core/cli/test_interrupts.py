"""SIGINT while libraries are imported ends the process at once; afterwards Python handles it."""

import signal
import subprocess
import sys

import pytest

from tokenyard_cli.interrupts import fatal_interrupts


def test_an_interrupt_within_ends_the_process():
    code = """
import signal
from tokenyard_cli.interrupts import fatal_interrupts
with fatal_interrupts():
    signal.raise_signal(signal.SIGINT)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_an_interrupt_afterwards_is_python_s():
    with fatal_interrupts():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_ignored_interrupt_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with fatal_interrupts():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
