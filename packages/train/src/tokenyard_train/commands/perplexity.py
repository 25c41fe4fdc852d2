"""The perplexity of a text: windows of its tokens, each predicted once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from tokenyard import Targets, TokenLoss
from tokenyard_train.commands.loaded_model import LoadedModel
from tokenyard_train.data.build import tokenize
from tokenyard_train.data.samples import HeldOut
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources import read_documents
from tokenyard_train.data.tokenizer import Tokenizer
from tokenyard_train.engine.sampling import check_vocabulary


@torch.no_grad()
def perplexity(
    loaded: LoadedModel, tokenizer: Tokenizer, data: Path, text_key: str, batch_size: int
) -> dict[str, Any]:
    """Return the record of a file or folder of text.

    Documents are concatenated, each followed by the end id, and cut into windows of max_seq_len, as
    the evaluation of a run does. Losses are in nats per token, and bits per byte count the bytes of
    the predicted text. Raises ConfigError.
    """
    option = f"--data {str(data)!r}"
    source = Source(path=str(data), text_key=text_key)
    tokens = tokenize(read_documents(source, "--data"), tokenizer, option)
    model = loaded.model
    check_vocabulary(model, [int(tokens.max())], option)
    held_out = HeldOut(tokens, model.max_seq_len, batch_size)
    model.eval()
    nats = 0.0
    for index in range(len(held_out)):
        rows = held_out.batch(index).to(next(model.parameters()).device)
        with loaded.autocast():
            loss: TokenLoss = model(rows.ids, targets=Targets(rows.targets))
        nats += loss.nats.item()
    predicted = held_out.predicted
    text_bytes = tokenizer.bytes_in(predicted)
    return {
        "data": str(data),
        "tokens": len(predicted),
        "bytes": text_bytes,
        "loss": nats / len(predicted),
        "perplexity": math.exp(min(nats / len(predicted), 700)),
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
    }
