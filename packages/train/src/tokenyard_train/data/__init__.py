"""Text as batches of token ids, deterministic by global sample index."""

from tokenyard_train.data.build import Data, build_data
from tokenyard_train.data.corpus import Document, python_stdlib, text_files
from tokenyard_train.data.samples import IGNORED, HeldOut, Samples
from tokenyard_train.data.tokenizer import BytesTokenizer, Tokenizer, build_tokenizer

__all__ = [
    "IGNORED",
    "BytesTokenizer",
    "Data",
    "Document",
    "HeldOut",
    "Samples",
    "Tokenizer",
    "build_data",
    "build_tokenizer",
    "python_stdlib",
    "text_files",
]
