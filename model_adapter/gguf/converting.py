"""What of a GGUF model is not its weights, as files of Hugging Face: configuration, tokenizer and
chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memdb import InvalidInputError, MemDBError
from model_adapter.gguf.file import GGUFFile, opened
from model_adapter.gguf.rope import stretch
from model_adapter.gguf.weights import GGUFWeights

_SIZES = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def convert(parts: Sequence[Path], target: Path, name: str) -> None:
    """Write configuration and tokenizer of a GGUF model, having seen that its weights can be read.

    Memory: about 0.7 GB for the tokenizer's lists and the libraries.

    Args:
        parts: its files.
        target: a folder, which is made if it is not there.
        name: what the configuration calls the model.

    Raises:
        InvalidInputError: it cannot be read; the error says why.
    """
    file, tensors = opened(parts)
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(parts[0].parent),
        "gguf_file": parts[0].name,
    }
    try:
        config = AutoConfig.from_pretrained(**where)
        # transformers looks into the first part alone.
        config.tie_word_embeddings = "output.weight" not in tensors
        _complete(config, file)
        stretch(config, file, tensors)
        with torch.device("meta"):  # names and shapes, no numbers
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        GGUFWeights(parts, model)
        tokenizer = AutoTokenizer.from_pretrained(**where, config=config)
    except MemDBError:
        raise
    except Exception as error:  # of gguf, transformers and tokenizers: no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        architecture = file.fields.get("general.architecture")
        raise InvalidInputError(
            f"the GGUF file '{parts[0]}' (architecture '{architecture}') cannot be read: {reason}. "
            "Take the model as a Hugging Face folder."
        ) from error
    tokenizer.save_pretrained(target)
    model.config.name_or_path = name
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)


def _complete(config: Any, file: GGUFFile) -> None:
    """Sizes that transformers does not ask a file of every architecture for."""
    architecture = file.fields.get("general.architecture")
    for said, name in _SIZES.items():
        field = f"{architecture}.{said}"
        # Where layers have several, transformers knows which is which.
        if field in file.fields and f"{field}_swa" not in file.fields and hasattr(config, name):
            value = file.fields[field]
            if isinstance(value, int):
                setattr(config, name, value)
