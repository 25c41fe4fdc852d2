"""One of two ranks that train a folder with tokenyard's experts, distributed by transformers.

Arguments: folder, and the options of DistributedConfig as JSON. Fails if the loss or a gradient
differs from those of transformers' own experts on one rank.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tokenyard.tolerance import relative_error
from tokenyard_models import use_in_transformers
from tokenyard_models.hf import transformers_plugin

folder, options = sys.argv[1:]
experts_seen = []
compute = transformers_plugin._compute


def counted(name, x, ids, weights, up, *rest):
    experts_seen.append(len(up))
    return compute(name, x, ids, weights, up, *rest)


dist.init_process_group("gloo")
torch.manual_seed(5)
batches = torch.randint(0, 67, (2, 2, 20))  # one for each rank
plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
want = sum(plain(ids, labels=ids).loss for ids in batches) / 2
want.backward()

use_in_transformers()
transformers_plugin._compute = counted
model = AutoModelForCausalLM.from_pretrained(
    folder,
    experts_implementation="tokenyard",
    distributed_config=DistributedConfig(**json.loads(options)),
)
ids = batches[dist.get_rank()]
loss = model(ids, labels=ids).loss
loss.backward()
mean = loss.detach().clone()
dist.all_reduce(mean)
assert relative_error(mean / 2, want.detach()) < 1e-5
gradients = {name: p.grad for name, p in plain.named_parameters()}
for name, parameter in model.named_parameters():
    assert relative_error(parameter.grad.full_tensor(), gradients.pop(name)) < 1e-5, name
assert not gradients
experts = 6 // json.loads(options).get("ep_size", 1)
assert experts_seen == [experts] * 3  # layers
dist.destroy_process_group()
os._exit(0)  # at exit, threads of gloo sometimes abort the process
