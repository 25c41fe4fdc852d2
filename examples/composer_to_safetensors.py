"""Copy the weights of a Composer or LLM Foundry checkpoint into a safetensors file.

Run it where the checkpoint was made, and only on checkpoints that you trust: they are pickles, and
reading a pickle can run code. It needs torch and safetensors, and for objects in the checkpoint
also what wrote them. Optimizer states are left out.

    python composer_to_safetensors.py ep0-ba4800-rank0.pt weights
    python composer_to_safetensors.py ep0-ba4800-rank0.pt weights --like hugging-face-folder

CHECKPOINT is a .pt file, or the folder of a sharded checkpoint. The folder is used as
`load_path: weights`; with --like, which copies config.json and the tokenizer from the folder that
the run started from, as `load_path: hf://weights`.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja")


def read(checkpoint: Path) -> dict:
    """Return what a checkpoint holds."""
    if not checkpoint.is_dir():
        return torch.load(checkpoint, map_location="cpu", weights_only=False)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(checkpoint, whole)
        return torch.load(whole, map_location="cpu", weights_only=False)


def weights(content: dict) -> dict[str, torch.Tensor]:
    """Return the model's tensors, under the names of the model inside Composer's."""
    state = content["state"]["model"] if "state" in content else content
    names = {name: name.removeprefix("module.").removeprefix("model.") for name in state}
    return {names[name]: value.contiguous().clone() for name, value in state.items()}


def main() -> None:
    """Convert the checkpoint of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--like", type=Path, help="Hugging Face folder of the same model")
    options = parser.parse_args()
    tensors = weights(read(options.checkpoint))
    options.out.mkdir(parents=True)
    save_file(tensors, options.out / "model.safetensors", {"format": "pt"})
    for pattern in ("config.json", *TOKENIZER) if options.like else ():
        for file in options.like.glob(pattern):
            shutil.copy(file, options.out)
    print(f"{len(tensors)} tensors in {options.out}")


if __name__ == "__main__":
    main()
