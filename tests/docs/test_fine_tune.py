"""The blocks of docs/fine-tune.md run in order. Answers are those that the page shows."""

import pytest
from blocks import ROOT, blocks
from shell import joined, lines, run

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers", minversion="5.14")
pytest.importorskip("peft", minversion="0.21")

PAGE = ROOT / "docs" / "fine-tune.md"
BLOCKS = [block for block in blocks(PAGE) if block.why_not is None]
TRL = next(i for i, block in enumerate(BLOCKS) if "from trl import" in block.text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture
def run_block(folder, monkeypatch, capsys):
    """Run a block in the page's folder, Python as a script. What it shows must be printed."""
    monkeypatch.chdir(folder)
    for name in ("loss_curve", "expert_heatmap"):
        monkeypatch.setattr(f"tokenyard_train.records.plots.{name}", lambda records, path: None)

    def run_block(block):
        if block.language == "python":
            script = {"__name__": "a page"}
            exec(compile("\n" * (block.line - 1) + block.text, str(PAGE), "exec"), script)
        elif block.language == "yaml":
            (folder / "tune.yaml").write_text(block.text)
        else:
            capsys.readouterr()
            for line in lines(block):
                run(line, monkeypatch)
            shown = [line for line in joined(block.text) if not line.startswith("$ ")]
            if shown:
                assert capsys.readouterr().out.splitlines() == shown
        return block.language == "console" and "--chat" in block.text

    return run_block


def test_the_way_of_tokenyard(run_block):
    answers = [run_block(block) for block in BLOCKS[:TRL]]
    assert sum(answers) == 1


def test_the_way_of_trl(run_block, folder):
    """It fine-tunes the base of the test before."""
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("datasets")
    assert sum(run_block(block) for block in BLOCKS[TRL:]) == 1
    assert (folder / "by-trl" / "adapter_config.json").is_file()
