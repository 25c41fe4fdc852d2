"""The commands of docs/cluster.md train over two "machines": two torchruns on this one."""

import os
import re
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from blocks import ROOT, blocks
from shell import CONFIG, PATH, lines

PAGE = ROOT / "docs" / "cluster.md"
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
TOOLS = {
    "scontrol": 'test "$1 $2 $3" = "show hostnames node[0-1]" && printf "localhost\\nother\\n"',
    "srun": 'for machine in 0 1; do "$@" & done; wait -n && wait -n',
}
"""Stand-ins: Slurm's job has two machines, which are both this one."""
SAVING = "for _ in 1 2; do kill -TERM $PPID; sleep 0.2; done; echo saved; exit 1"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"train_loader": {"name": "python_stdlib"}})
    )
    return tmp_path


def run(command, folder, **environment):
    """Run a command in a folder; return what it prints."""
    environment = os.environ | {"PATH": PATH} | environment
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(command, **options, shell=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.full
def test_two_terminals_are_two_machines(folder):
    (command,) = lines(next(block for block in blocks(PAGE) if block.language == "console"))
    with ThreadPoolExecutor() as terminals:
        runs = [terminals.submit(run, command, folder) for _ in range(2)]
        printed = sorted(run.result() for run in runs)
    assert printed[0] == ""  # only rank 0 prints
    assert "exchange" in printed[1]
    assert (folder / "runs" / "cluster" / "ba2").is_dir()


def test_the_page_shows_the_script():
    assert SCRIPT.read_text() in PAGE.read_text()


@pytest.mark.full
def test_the_script_trains_and_resumes(folder):
    command = f"bash {SCRIPT} config.yaml parallel.strategy=fsdp"
    run(command, folder, **slurm(folder, TOOLS), SLURM_GPUS_ON_NODE="1")
    resumed = run(f"{command} max_duration=3ba", folder, **slurm(folder, TOOLS), NPROC="1")
    steps = re.findall(r'"kind": "train", "batch": (\d+)', metrics(folder))
    assert steps == ["1", "2", "3"], resumed


@pytest.mark.parametrize(
    ("torchrun", "code", "calls"),
    [
        ("kill -TERM $PPID; exit 1", 75, "requeue 7\n"),  # as torchrun after SIGTERM
        (SAVING, 75, "saved\nrequeue 7\n"),
        ("exit 1", 1, ""),
        ("exit 0", 0, ""),
    ],
    ids=["stopped", "stopped again while it saves", "failed", "finished"],
)
def test_only_a_stopped_job_goes_back_to_the_queue(tmp_path, torchrun, code, calls):
    scontrol = 'if [ "$1" = show ]; then echo node0; else echo "$@"; fi'
    tools = {"scontrol": scontrol, "srun": '"$@"', "torchrun": torchrun}
    environment = os.environ | slurm(tmp_path, tools) | {"NPROC": "1"}
    result = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, calls)


def test_a_node_without_gpus_needs_a_number_of_ranks(tmp_path):
    environment = os.environ | slurm(tmp_path, {"scontrol": "echo node0"})
    result = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "SLURM_GPUS_ON_NODE: no GPUs here, set NPROC" in result.stderr


def slurm(folder, tools):
    """Return the environment of a Slurm job, with stand-ins for programs."""
    for name, body in tools.items():
        program = folder / "tools" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(stat.S_IRWXU)
    return {
        "PATH": f"{folder / 'tools'}{os.pathsep}{PATH}",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "RDZV_PORT": "29431",
    }


def metrics(folder):
    return (folder / "runs" / "run" / "metrics.jsonl").read_text()
