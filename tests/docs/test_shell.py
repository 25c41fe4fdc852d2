"""Every command of the site and the READMEs runs, or the page has a reason not to run it."""

import json
import shutil

import pytest
import yaml
from blocks import PAGES, ROOT, blocks, named
from shell import CONFIG, joined, lines, run

# test_fine_tune.py and test_tutorials.py run the blocks of these pages in order
IN_ORDER = [ROOT / "docs" / name for name in ("fine-tune.md", "plugin.md", "extend.md")]
LONG = ("--shape cpu", "--peers", "launch")  # commands that take more than a few seconds


def consoles():
    """Yield every console block that runs; mark long ones `full`."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "console" and block.why_not is None and page not in IN_ORDER:
                marks = [pytest.mark.full] if any(word in block.text for word in LONG) else []
                yield pytest.param(block, id=f"{named(page)}:{block.line}", marks=marks)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the files that the pages assume: examples, config, texts and a trained run."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "fox.txt").write_text(
        "The quick brown fox jumps over the lazy dog. " * 400
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("tokenyard train config.yaml run_name=quickstart", patch)
    return folder


def add_sources(folder):
    """Add a source to pack and a tokenizer."""
    zstandard = pytest.importorskip("zstandard")
    tokenizers = pytest.importorskip("tokenizers")
    (folder / "sources").mkdir()
    rows = (json.dumps({"text": f"the number {i}"}) + "\n" for i in range(50))
    (folder / "sources" / "numbers.jsonl.zst").write_bytes(
        zstandard.compress("".join(rows).encode())
    )
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"the": 0, "number": 1, "?": 2, "<|endoftext|>": 3}, "?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "path" / "to").mkdir(parents=True)
    words.save(str(folder / "path" / "to" / "tokenizer.json"))
    (folder / "path" / "to" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>"})
    )


@pytest.mark.parametrize("block", list(consoles()))
def test_commands_run(block, workshop, tmp_path, monkeypatch):
    """Run the commands of a block in order, in a copy of the workshop."""
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    if "sources/" in block.text:
        add_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in lines(block):
        run(line, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_in_console_blocks(page):
    """Commands follow a `$` in a `console` block. No block has a shell as its language."""
    page_blocks = blocks(page)
    consoles = [lines(block) for block in page_blocks if block.language == "console"]
    assert all(consoles)
    text = joined(page.read_text(encoding="utf-8"))
    prompts = [line.strip().removeprefix("$ ") for line in text if line.strip().startswith("$ ")]
    assert prompts == [line for console in consoles for line in console]
    shells = ("bash", "sh", "shell", "zsh")
    assert not [block.line for block in page_blocks if block.language in shells]
