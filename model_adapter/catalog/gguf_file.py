"""A GGUF file as a folder of Hugging Face: float32 safetensors, configuration, tokenizer.

transformers reads such files, too, but holds the whole model in float32 more than once. Here one
tensor is dequantized at a time, and a shard is on the disk before the next one begins. Names and
layouts of the tensors are transformers' own: its map of names, its processor of an architecture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from huggingface_hub import split_torch_state_dict_into_shards
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)

#: Largest shard. A tensor that is larger has a shard of its own.
SHARD = "500MB"
#: Rows of a tensor that are dequantized at once.
ROWS = 1024


def convert_gguf(
    gguf: Path, target: Path, name: str, progress: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Dequantize a GGUF file to float32 safetensors, with its configuration and its tokenizer.

    The weights are bit for bit those that transformers reads from the file. Memory: the larger of
    a shard and the largest tensor in float32, and about 0.7 GB for the tokenizer's lists and the
    libraries.

    Args:
        gguf: the file.
        target: a folder, which is made.
        name: what the configuration calls the model.
        progress: told how many tensors are on the disk, of how many, after each shard.

    Raises:
        ValueError: the file lacks weights of its architecture, or has them in other shapes.
        Exception: what gguf, transformers and the file system raise has no common base.
    """
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    config = AutoConfig.from_pretrained(**where)
    with torch.device("meta"):  # names and shapes, no numbers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.name_or_path = name
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    wanted = dict(model.named_parameters())  # tied weights once
    source = _Source(gguf, model, {key: weight.shape for key, weight in wanted.items()})
    plan = split_torch_state_dict_into_shards(wanted, max_shard_size=SHARD)
    done = 0
    for file, names in plan.filename_to_tensors.items():
        # Nothing holds a shard past this line: else there were two while the next one is made.
        save_file(source.weights(names), target / file, metadata={"format": "pt"})
        done += len(names)
        progress(done, len(wanted))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class _Source:
    """The weights of a model, in a GGUF file, by the names that transformers gives them."""

    def __init__(self, gguf: Path, model: Any, shapes: Mapping[str, torch.Size]) -> None:
        self._gguf = gguf
        self._shapes = shapes
        # Read here and dropped: its fields (each token, each merge) take 0.5 GB.
        reader = GGUFReader(gguf)
        architecture = read_field(reader, "general.architecture")[0]
        kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = kind(config=model.config.to_dict())
        self._names = get_gguf_hf_weights_map(model, self._processor)
        self._tensors = {
            self._names[tensor.name]: tensor
            for tensor in reader.tensors
            if tensor.name in self._names
        }
        lacking = sorted(shapes.keys() - self._tensors.keys())
        if lacking:
            raise ValueError(
                f"{len(lacking)} of the model's {len(shapes)} weights are not in the file, for "
                f"example {lacking[0]}"
            )

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        """Some weights, float32."""
        return {name: self._weight(name) for name in names}

    def _weight(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        values = self._processor.process(
            weights=self._dequantized(tensor),
            name=tensor.name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": {}},
        ).weights
        if values.shape != self._shapes[name]:
            raise ValueError(
                f"the tensor {tensor.name} has the shape {values.shape}, where the model's {name} "
                f"has {tuple(self._shapes[name])}"
            )
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def _dequantized(self, tensor: ReaderTensor) -> NDArray[np.float32]:
        """Some rows at a time, since `dequantize` needs twice what it gives. They are read, not
        mapped: what was touched of a mapping counts as memory."""
        values = np.empty([int(n) for n in reversed(tensor.shape)], np.float32)
        rows = values.reshape(-1, values.shape[-1])
        width, dtype = tensor.data.shape[-1], tensor.data.dtype
        with self._gguf.open("rb") as file:
            file.seek(int(tensor.data_offset))
            for begin in range(0, len(rows), ROWS):
                some = rows[begin : begin + ROWS]
                stored = np.fromfile(file, dtype, len(some) * width).reshape(len(some), width)
                some[:] = dequantize(stored, tensor.tensor_type)
        return values
