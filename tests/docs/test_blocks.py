"""What the site and the READMEs show can be run: Python as it stands, commands by their names and options, configs."""

import os
import shlex
import subprocess
import sys

import pytest
import typer
import yaml
from blocks import PAGES, ROOT, blocks, named
from shell import CONFIG, PATH, lines
from typer.core import TyperGroup

from tokenyard_cli import app
from tokenyard_train.config import read_config

PLUGIN = ROOT / "docs" / "plugin.md"


def with_blocks(language):
    return [page for page in PAGES if any(b.language == language for b in blocks(page))]


@pytest.mark.parametrize(
    "page", [page for page in with_blocks("python") if page != PLUGIN], ids=named
)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after another, in one namespace."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "a page"}
    for block in blocks(page):
        if block.language == "python" and block.why_not is None:
            exec(compile("\n" * (block.line - 1) + block.text, named(page), "exec"), space)


def commands(page):
    """Give each command that a page's consoles show, without the rest of a shell's line."""
    for block in blocks(page):
        if block.language == "console":
            for line in block.text.splitlines():
                if line.startswith("$ "):
                    for part in line.removeprefix("$ ").split("&&"):
                        yield shlex.split(part, comments=True)


@pytest.mark.parametrize("page", with_blocks("console"), ids=named)
def test_commands_exist(page):
    """Of the `tokenyard` command: its subcommands, and every option that is given."""
    for words in commands(page):
        while words and "=" in words[0]:  # environment
            words = words[1:]
        if words[:1] == ["tokenyard"]:
            check_options(words[1:])


def check_options(words):
    command = typer.main.get_command(app)
    while isinstance(command, TyperGroup):
        assert words[0] in command.list_commands(None), words
        command = command.get_command(None, words[0])
        words = words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= known, f"{command.name} has no {given - known}"


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=named)
def test_configs_are_read(page):
    """Each is YAML; one that is whole is a config that is taken."""
    for block in blocks(page):
        if block.language == "yaml":
            content = yaml.safe_load(block.text)
            assert isinstance(content, dict)
            if {"train_loader", "max_duration"} <= content.keys():
                read_config(content)
            elif "backends" in content or "parallel" in content:
                quick = {
                    "model": {"name": "mixtral", "size": "tiny"},
                    "train_loader": {"name": "python_stdlib"},
                }
                read_config(
                    content
                    | quick
                    | {"max_duration": "1ba", "global_train_batch_size": 8, "device": "cpu"}
                )


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Write the tutorial's project, as a reader does, and install it into a folder of its own."""
    root, site = tmp_path_factory.mktemp("tutorial") / "acme", tmp_path_factory.mktemp("site")
    text = PLUGIN.read_text()
    for block in blocks(PLUGIN):
        if block.language in ("python", "toml"):
            before = text[: text.index(block.text)]
            name = before[: before.rindex("`" * 3)].rpartition("\n`")[2].split("`")[0]
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(block.text)
    (root / "src" / "acme_experts" / "__init__.py").touch()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
    ]
    subprocess.run([*pip, str(site), str(root)], check=True, timeout=120)
    return root, site


@pytest.mark.full
def test_the_tutorial_s_commands_run(plugin, tmp_path):
    """Those after the kit, which use the plugin; what they train is small."""
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"train_loader": {"name": "python_stdlib"}})
    )
    console = [block for block in blocks(PLUGIN) if block.language == "console"][-1]
    for line in lines(console):
        environment = os.environ | {"PATH": PATH, "PYTHONPATH": str(plugin[1])}
        subprocess.run(line, shell=True, check=True, timeout=300, cwd=tmp_path, env=environment)


def test_the_tutorial_s_plugin_passes_the_kit(plugin, tmp_path):
    root, site = plugin
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(root)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST")
    }
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(root / "tests")],
        env=environment | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "66 passed, 35 skipped" in ran.stdout  # as the page says
    assert "'acme' has no biases; set bias: false" in ran.stdout
