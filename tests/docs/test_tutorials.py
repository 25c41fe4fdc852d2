"""The projects of the tutorials install, pass the conformance kit and train."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from blocks import ROOT, blocks
from shell import CONFIG, PATH, lines

KERNEL = ROOT / "docs" / "plugin.md"
MODEL = ROOT / "docs" / "extend.md"
RESEARCH = ROOT / "docs" / "research.md"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a function that writes and installs a page's project: its folder, an environment."""

    def write(page):
        root = tmp_path_factory.mktemp("tutorial")
        site = tmp_path_factory.mktemp("site")
        for block in blocks(page):
            if block.language in ("python", "toml", "yaml"):
                path = root / file_name(page, block)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
        for package in (root / "src").iterdir():
            (package / "__init__.py").touch()
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(site))
        command = [sys.executable, "-m", "pip", "install", *options, str(root)]
        subprocess.run(command, check=True, timeout=120)
        paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        return root, os.environ | {"PATH": PATH, "PYTHONPATH": paths}

    return write


def file_name(page, block):
    """Return the name that begins the last line with a name before a block."""
    text = page.read_text()
    return re.findall(r"^`([\w./-]+\.\w+)`", text[: text.index(block.text)], re.MULTILINE)[-1]


def kit(root, environment):
    """Run a project's tests; return what pytest prints."""
    options = ["-v", "-rs", "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(root)]
    plain = {name: value for name, value in environment.items() if not name.startswith("PYTEST")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(root / "tests")],
        env=plain,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


def counts(output):
    """Return `N passed, M skipped` of pytest's summary."""
    return re.search(r"\d+ passed, \d+ skipped", output).group()


def test_the_kernel_passes_the_kit(project):
    output = kit(*project(KERNEL))
    assert f"`{counts(output)}`" in KERNEL.read_text()
    assert "'acme' has no biases; set bias: false" in output


@pytest.mark.full
def test_the_kernel_trains(project, tmp_path):
    """The last console block of the page trains a small model."""
    _, environment = project(KERNEL)
    config = CONFIG | {"train_loader": {"name": "python_stdlib"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run(KERNEL, tmp_path, environment)


def test_the_router_and_the_model_pass_the_kit(project):
    output = kit(*project(MODEL))
    assert f"`{counts(output)}`" in MODEL.read_text()
    for name in ("TestRouter", "TestModel"):
        assert f"::{name}::test_no_standard_test_is_overridden PASSED" in output


@pytest.mark.full
def test_the_router_and_the_model_train(project):
    root, environment = project(MODEL)
    run(MODEL, root, environment)
    metrics = (root / "runs" / "router" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["dropped"] > 0


def test_the_copy_of_the_research_plugin_has_its_own_name(tmp_path):
    """Run the page's lines that copy and rename the example; then the plugin offers the model."""
    (console,) = [b for b in blocks(RESEARCH) if "copy and rename" in (b.why_not or "")]
    script = "\n".join(list(lines(console))[:3])
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "examples").symlink_to(ROOT / "examples")
    subprocess.run(script, shell=True, check=True, timeout=60, cwd=clone)
    copy = tmp_path / "my-sparse"
    texts = [path.read_text() for path in copy.rglob("*.*") if path.suffix in (".py", ".toml")]
    assert len(texts) >= 4
    assert not any(re.search("pruned.llama", text) for text in texts)
    command = "from my_sparse.plugin import tokenyard_models as m; print(m()[0])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(copy / "src"), *sys.path))}
    listed = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True
    )
    assert "my_sparse.model:PrunedLlama" in listed.stdout, listed.stderr


def run(page, folder, environment):
    """Run the last console block of a page."""
    console = [block for block in blocks(page) if block.language == "console"][-1]
    for line in lines(console):
        subprocess.run(line, shell=True, check=True, timeout=300, cwd=folder, env=environment)
