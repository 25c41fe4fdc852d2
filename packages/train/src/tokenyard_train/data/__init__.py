"""Read text as batches of token ids, deterministic by global sample index."""

from tokenyard_train.data.batch import Batch
from tokenyard_train.data.build import Data, build_data
from tokenyard_train.data.corpus import Document, python_stdlib
from tokenyard_train.data.finetuning import PackedDocuments, PackedHeldOut
from tokenyard_train.data.mixture import Mixture
from tokenyard_train.data.samples import HeldOut, Samples
from tokenyard_train.data.tokenizer import BytesTokenizer, Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import CorruptError, TokenFile, Tokens

__all__ = [
    "Batch",
    "BytesTokenizer",
    "CorruptError",
    "Data",
    "Document",
    "HeldOut",
    "Mixture",
    "PackedDocuments",
    "PackedHeldOut",
    "Samples",
    "TokenFile",
    "Tokenizer",
    "Tokens",
    "build_data",
    "build_tokenizer",
    "python_stdlib",
]
