"""Code of the site and the READMEs is valid: Python runs, commands exist, configs are accepted."""

import shlex

import pytest
import typer
import yaml
from blocks import PAGES, ROOT, blocks, named
from shell import lines
from typer.core import TyperGroup

from tokenyard_cli import app
from tokenyard_train.config import read_config

# test_fine_tune.py and test_tutorials.py run the blocks of these pages in order
IN_ORDER = [ROOT / "docs" / name for name in ("fine-tune.md", "plugin.md", "extend.md")]
SMALL = {
    "model": {"name": "mixtral", "size": "tiny"},
    "train_loader": {"name": "python_stdlib"},
    "max_duration": "1ba",
    "global_train_batch_size": 8,
    "device": "cpu",
}


def with_blocks(language):
    return [page for page in PAGES if any(b.language == language for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_are_short(page):
    """A line of code has at most 75 characters. What a program prints may be longer."""
    assert not [
        f"{block.line + i}: {line}"
        for block in blocks(page)
        if block.language != "text"
        for i, line in enumerate(block.text.splitlines())
        if len(line) > 75
    ]


@pytest.mark.parametrize(
    "page", [page for page in with_blocks("python") if page not in IN_ORDER], ids=named
)
def test_python_runs(page, tmp_path, monkeypatch):
    """Run the blocks of a page in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "a page"}
    for block in blocks(page):
        if block.language == "python" and block.why_not is None:
            exec(compile("\n" * (block.line - 1) + block.text, named(page), "exec"), space)


def commands(page):
    """Yield the words of each command in a page's console blocks."""
    for block in blocks(page):
        if block.language == "console":
            for line in lines(block):
                for part in line.split("&&"):
                    yield shlex.split(part, comments=True)


@pytest.mark.parametrize("page", with_blocks("console"), ids=named)
def test_commands_exist(page):
    """Subcommands and options of the `tokenyard` command exist."""
    for words in commands(page):
        while words and "=" in words[0]:  # an environment variable
            words = words[1:]
        if words[:1] == ["tokenyard"]:
            check_options(words[1:])


def check_options(words):
    command = typer.main.get_command(app)
    while isinstance(command, TyperGroup) and not words[0].startswith("--"):
        assert words[0] in command.list_commands(None), words
        command = command.get_command(None, words[0])
        words = words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= known, f"{command.name} has no {options - known}"


@pytest.mark.parametrize(
    "page", [page for page in with_blocks("yaml") if page not in IN_ORDER], ids=named
)
def test_configs_are_accepted(page):
    """Blocks are YAML mappings. Complete configs, and sections with a small model, are valid."""
    for block in blocks(page):
        if block.language == "yaml":
            content = yaml.safe_load(block.text)
            assert isinstance(content, dict)
            if {"train_loader", "max_duration"} <= content.keys():
                read_config(content)
            elif "backends" in content or "parallel" in content:
                read_config(content | SMALL)
