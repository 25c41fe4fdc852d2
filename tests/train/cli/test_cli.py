"""The `tokenyard` command, from its arguments to its output and exit code."""

import os
import subprocess
import sys

import pytest
import yaml

from tokenyard import Backend, BackendChoice
from tokenyard_train import __version__
from tokenyard_train.commands.check import describe_choice


@pytest.fixture
def path(settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_train_then_generate(tokenyard, path, tmp_path):
    code, _, errors = tokenyard("train", path, "max_duration=2ba", "optimizer.lr=1e-3")
    assert (code, errors) == (0, "")
    code, out, _ = tokenyard(
        "generate", str(tmp_path / "run"), "--prompt", "3 times", "--max-new-tokens", "5"
    )
    assert code == 0
    assert out.startswith("3 times")


def test_check_shows_size_work_memory_and_backends(tokenyard, path):
    code, out, _ = tokenyard("check", path)
    assert code == 0
    for part in (
        "active parameters",
        "FLOPs per token",
        "memory of a rank",
        "6 batches",
        "held-out text",
        "single",
    ):
        assert part in out


def test_check_of_a_dense_model_has_no_backends(tokenyard, path):
    code, out, _ = tokenyard("check", path, "model={name: llama, size: tiny}")
    assert code == 0
    assert "active parameters" in out
    assert "MoE layers" not in out


def test_check_says_why_a_backend_was_passed_over():
    chosen = BackendChoice(
        "experts", Backend("torch", "module:Class"), passed_over={"fast": "it needs a GPU"}
    )
    assert describe_choice(chosen) == "torch (passed over fast: it needs a GPU)"


def test_check_allocates_no_memory_for_the_model(tokenyard, path):
    code, out, _ = tokenyard(
        "check", path, "model.size=full", "model.d_model=6144", "model.n_layers=4"
    )
    assert code == 0
    assert "GiB" in out


def test_check_refuses_what_train_would(tokenyard, path):
    code, _, errors = tokenyard("check", path, "max_duration=0.001ep")
    assert (code, errors) == (
        2,
        "error: max_duration is 0.001ep, which is less than one batch of 96 tokens\n",
    )


def test_backends_prints_the_table(tokenyard):
    code, out, _ = tokenyard("backends")
    assert code == 0
    assert "tokenyard-models" in out


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_mistake_is_one_sentence_and_exit_code_2(tokenyard, path, command):
    code, out, errors = tokenyard(command, path, "optimizer.lrr=1")
    assert (code, out) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert "optimizer.lrr is not a known key (did you mean 'lr'?)" in line


def test_a_misspelt_model_is_one_sentence(tokenyard, path):
    code, out, errors = tokenyard("check", path, "model.name=dbrxx")
    assert (code, out) == (2, "")
    assert errors.startswith(
        "error: model backend 'dbrxx' is unknown (did you mean 'dbrx'?); installed: "
    )
    assert errors.count("\n") == 1


def test_help_and_version_do_not_load_torch():
    code = (
        "import sys; sys.argv = ['tokenyard', '{}']\n"
        "from tokenyard_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    for option, part in (("--help", "generate"), ("--version", f"tokenyard-train {__version__}")):
        run = subprocess.run(
            [sys.executable, "-c", code.format(option)], check=True, capture_output=True, text=True
        )
        assert part in run.stdout


def test_a_run_continues_after_a_broken_pipe(path, tmp_path):
    command = [sys.executable, "-m", "tokenyard_train", "train", path, "max_duration=3ba"]
    command.append("eval_loader=null")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")
    assert (tmp_path / "run" / "ba3").is_dir()


def test_one_of_several_ranks_exits_without_teardown():
    """The exit code, the output and the functions of `atexit` are those of a normal exit."""
    code = (
        "import atexit, os, sys\n"
        "from tokenyard_cli import main\n"
        "atexit.register(print, 'at exit')\n"
        "class Left:\n"
        "    def __del__(self, write=os.write):\n"
        "        write(1, b'teardown')\n"
        "left = Left()\n"
        "sys.argv = ['tokenyard', 'check', '--nowhere']\n"  # refused before torch is imported
        "main()\n"
    )
    for processes, output in (("1", "at exit\nteardown"), ("2", "at exit\n")):
        environment = os.environ | {"WORLD_SIZE": processes, "RANK": "0"}
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120
        )
        assert (result.returncode, result.stdout) == (2, output)
        assert "--nowhere" in result.stderr
