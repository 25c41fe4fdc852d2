"""`python -m tokenyard_kernels_cuda` compiles ahead of time."""

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from example_sources import SPLIT

from tokenyard_kernels_cuda import __main__ as command


def test_compiles_all_sources_and_prints_the_folder(capsys, cubins, monkeypatch):
    monkeypatch.setattr(command, "sources", lambda: [SPLIT])
    assert command.main(["sm_90a"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{SPLIT} ")
    assert f"kept in {cubins}" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is no GPU here to compile for; give an architecture, such as sm_90a"),
        (["sm_80", "sm_90a"], "usage: "),
        (["--help"], "usage: "),
        (["hopper"], "does not compile for hopper"),
    ],
)
def test_wrong_arguments_are_one_sentence(capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(arguments) == 2
    assert sentence in capsys.readouterr().err
