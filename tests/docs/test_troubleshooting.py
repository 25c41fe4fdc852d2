"""The errors of the page Troubleshooting are raised as they are quoted, or are in the code."""

import re
import shlex
import sys

import pytest
import yaml
from blocks import ROOT
from shell import CONFIG

import tokenyard_cli

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
RAISED = re.findall(r"<!-- raised by: (.+) -->\n```text\n((?:.+\n)+)```", PAGE)
IN_THE_CODE = re.findall(r"<!-- in the code: (.+) -->", PAGE)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a config, a text and a trained run."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "my-texts").mkdir()
    text = "The quick brown fox jumps over the lazy dog. " * 400
    (folder / "my-texts" / "fox.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert not run("tokenyard train config.yaml run_name=quickstart", patch)
    return folder


def run(line, monkeypatch):
    """Run a command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        tokenyard_cli.main()
    return ended.value.code


@pytest.mark.parametrize(("line", "error"), RAISED, ids=[line for line, _ in RAISED])
def test_the_error_is_raised(line, error, workshop, monkeypatch, capsys):
    if "tests on a CPU" in error:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(workshop)
    code = run(line, monkeypatch)
    printed = capsys.readouterr().err.replace(str(workshop), "FOLDER")
    assert " ".join(error.split()) in printed.splitlines()
    assert code == 2


@pytest.mark.parametrize("sentence", IN_THE_CODE)
def test_the_sentence_is_in_the_code(sentence):
    sources = ROOT.glob("packages/*/src/**/*.py")
    assert any(sentence in source.read_text(encoding="utf-8") for source in sources)


def test_every_quoted_error_is_tested():
    quoted = re.findall(r"^error: ", PAGE, re.MULTILINE)
    assert len(RAISED) > 15
    assert len(quoted) <= len(RAISED) + len(IN_THE_CODE)
