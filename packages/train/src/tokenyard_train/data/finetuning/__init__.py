"""Read conversations and instructions, and pack them into rows by first fit."""

from tokenyard_train.data.finetuning.build import build_packed
from tokenyard_train.data.finetuning.packed import PackedDocuments, PackedHeldOut

__all__ = ["PackedDocuments", "PackedHeldOut", "build_packed"]
