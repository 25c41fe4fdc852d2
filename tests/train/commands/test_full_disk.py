"""Commands whose output cannot be written end in one sentence, with nothing half-written.

A limit on the size of files stops each write in the middle, in Python as in the libraries that
write weights and pictures. `train` is tested in tests/train/checkpoint.
"""

import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from tokenyard_models import Llama, to_hf

COMMANDS = {
    "convert": ("convert", "{run}", "{out}"),
    "convert to a run": ("convert", "{folder}", "{out}", "--to", "tokenyard"),
    "convert to megablocks": ("convert", "{run}", "{out}", "--to", "megablocks"),
    "upcycle": ("upcycle", "{dense}", "{out}", "--num-experts", "4", "--top-k", "2"),
    "routing": ("routing", "{run}", "--data", "{text}", "--out", "{out}"),
}


@contextmanager
def files_of_at_most(size):
    """Let every write fail that would make a file larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def inputs(trained, tmp_path_factory):
    """Return a run, its text, and two Hugging Face folders, with and without experts."""
    from tokenyard_train.commands.convert import convert
    from tokenyard_train.commands.options import ConvertOptions

    base = tmp_path_factory.mktemp("inputs")
    convert(ConvertOptions(trained, base / "folder"), Console(quiet=True))
    dense = Llama({"size": "tiny", "vocab_size": 257})
    dense.init_weights(1)
    to_hf(dense, base / "dense", like=base / "folder", dtype=torch.float32)
    return {
        "run": trained,
        "text": trained.parent / "text" / "a.txt",
        "folder": base / "folder",
        "dense": base / "dense",
    }


@pytest.mark.parametrize("size", [0, 100, 3000, 30_000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_write_that_fails_is_one_sentence_and_leaves_nothing(
    command, size, inputs, tmp_path, tokenyard
):
    out = tmp_path / "out"
    arguments = [word.format(out=out, **inputs) for word in COMMANDS[command]]
    with files_of_at_most(size):
        code, _, error = tokenyard(*arguments)
    if code == 0:  # its files are smaller
        return
    assert code == 2
    sentences = [line for line in error.splitlines() if not line.startswith("WARNING")]
    assert len(sentences) == 1
    assert "File too large" in error
    left = [path for path in tmp_path.rglob("*") if path != out]
    assert left == [] or [path.name for path in left] == ["routing.json"]
    shutil.rmtree(out, ignore_errors=True)
    assert tokenyard(*arguments)[0] == 0
