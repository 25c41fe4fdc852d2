"""Run commands of console blocks: `tokenyard` in this process, others in a shell."""

import glob
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tokenyard_cli

CONFIG = {
    "model": {"name": "mixtral", "size": "tiny"},
    "train_loader": {"name": "text", "dataset": {"path": "my-texts"}},
    "global_train_batch_size": 64,
    "max_seq_len": 64,
    "max_duration": "2ba",
    "device": "cpu",
}
"""The config.yaml of the commands of pages that show no config."""

PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


def joined(text):
    """Return the lines of a text. A command that continues after a backslash is one line."""
    return text.replace("\\\n", "").splitlines()


def lines(block):
    """Return the commands of a console block without prompt and output."""
    return [line.removeprefix("$ ") for line in joined(block.text) if line.startswith("$ ")]


def run(line, monkeypatch):
    """Run a line in the current folder and require success."""
    words = shlex.split(line, comments=True)
    with monkeypatch.context() as patch:
        while "=" in words[0]:
            patch.setenv(*words.pop(0).split("=", 1))
        if words[0] != "tokenyard" or words[1] == "launch":
            subprocess.run(
                line, shell=True, check=True, timeout=600, env=os.environ | {"PATH": PATH}
            )
            return
        patch.setattr(
            sys, "argv", [word for pattern in words for word in glob.glob(pattern) or [pattern]]
        )
        with pytest.raises(SystemExit) as ended:
            tokenyard_cli.main()
    assert not ended.value.code, line
