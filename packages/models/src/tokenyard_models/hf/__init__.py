"""Read and write Hugging Face folders. transformers is not needed; a test proves it."""

from tokenyard_models.hf._folder import Folder, WeightsError, has_weights, is_hf_folder
from tokenyard_models.hf._load import from_hf, load_weights
from tokenyard_models.hf._megablocks import load_foundry, to_megablocks
from tokenyard_models.hf._peft_read import PeftFolder, is_peft
from tokenyard_models.hf._peft_write import to_peft
from tokenyard_models.hf._read_config import DescribedModel, described_model, model_section
from tokenyard_models.hf._save import TOKENIZER_FILES, format_to_write, to_hf
from tokenyard_models.hf._shards import new_folder
from tokenyard_models.hf._upcycle import upcycle

__all__ = [
    "TOKENIZER_FILES",
    "DescribedModel",
    "Folder",
    "PeftFolder",
    "WeightsError",
    "described_model",
    "format_to_write",
    "from_hf",
    "has_weights",
    "is_hf_folder",
    "is_peft",
    "load_foundry",
    "load_weights",
    "model_section",
    "new_folder",
    "to_hf",
    "to_megablocks",
    "to_peft",
    "upcycle",
]
