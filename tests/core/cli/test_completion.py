"""The shell completes commands, options and their values, without torch."""

import os
import subprocess
import sys

import pytest

COMPLETE = """
import sys
from tokenyard_cli import main
sys.argv = ["tokenyard"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("tokenyard ba", {"backends"}),
        ("tokenyard bench ro", {"routing"}),
        ("tokenyard bench layer --sh", {"--shape"}),
        ("tokenyard train co", set()),  # the shell completes files
    ],
)
def test_bash_completes(line, completed):
    environment = os.environ | {
        "_TOKENYARD_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    command = [sys.executable, "-c", COMPLETE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == completed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell):
    environment = os.environ | {"_TOKENYARD_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-c", COMPLETE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "complete" in done.stdout
    assert "tokenyard" in done.stdout
