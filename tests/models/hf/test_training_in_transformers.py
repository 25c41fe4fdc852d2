"""Trainer, PEFT, FSDP2 and expert parallelism of transformers train tokenyard's experts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from hf_models import VOCABULARY, made, mixtral, qwen3_moe
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.dbrx import modeling_dbrx

from tokenyard.tolerance import relative_error
from tokenyard_models import use_in_transformers
from tokenyard_models.hf import transformers_plugin


@pytest.fixture
def registered(monkeypatch):
    """Register the experts; return a list that gets an item for each call of theirs."""
    monkeypatch.setattr(modeling_dbrx, "DbrxExperts", modeling_dbrx.DbrxExperts)
    use_in_transformers()
    calls = []
    compute = transformers_plugin._compute
    monkeypatch.setattr(
        transformers_plugin, "_compute", lambda *rest: calls.append(1) or compute(*rest)
    )
    return calls


@pytest.fixture(params=[mixtral, qwen3_moe], ids=lambda config: config.__name__)
def folder(request, tmp_path):
    made(request.param()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(folder, out, implementation, lora):
    """Train three steps; return the parameters that are trained."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation)
    if lora:
        peft = pytest.importorskip("peft", minversion="0.21")
        config = peft.LoraConfig(
            r=3,
            target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        torch.manual_seed(2)
        model = peft.get_peft_model(model, config)
    ids = torch.randint(0, VOCABULARY, (12, 20), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        str(out),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        optim="sgd",  # AdamW's first steps take the sign of gradients that are only rounding
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows).train()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "peft"])
def test_trainer_with_recompute_trains_as_with_eager_experts(folder, tmp_path, lora, registered):
    want = trained(folder, tmp_path / "eager", "eager", lora)
    assert not registered
    got = trained(folder, tmp_path / "tokenyard", "tokenyard", lora)
    layers = AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers
    assert len(registered) == 3 * 2 * layers  # steps; the forward pass and its recompute
    start = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in got.items():
        assert relative_error(parameter, want[name]) < 1e-5, name
        if name in start:
            assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize(
    "options", [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}], ids=["fsdp", "expert parallel"]
)
def test_transformers_distributes_the_experts_over_two_ranks(options, tmp_path):
    distributed = pytest.importorskip("transformers.distributed")
    fields = {field.name for field in dataclasses.fields(distributed.DistributedConfig)}
    if not options.keys() <= fields:
        pytest.skip("this transformers has no fsdp_size and ep_size")
    made(qwen3_moe()).save_pretrained(tmp_path / "base")
    script = Path(__file__).with_name("two_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, str(script), str(tmp_path / "base"), json.dumps(options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
