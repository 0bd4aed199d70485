"""Models of transformers whose large weights lie in a file of 8-bit weights: made, and made again
from the file. It takes transformers seconds to import what models are made of, so this is imported
where one is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from model_adapter.gguf.weights import GGUFWeights
from model_adapter.models.eight_bit.file import Source, WeightFile
from model_adapter.models.eight_bit.layers import EightBitEmbedding, EightBitLinear
from model_adapter.models.gguf_models import gguf_in
from model_adapter.models.products import Linear

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


def empty_model(config: Any) -> Any:
    """A model of transformers with no numbers in it but its buffers."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model.eval()


def sources_in(folder: Path, model: Any) -> dict[str, Source] | None:
    """The weights of a model as they lie in a folder's safetensors, or in its GGUF file, to be read
    some at a time.

    Returns:
        By name; None where the folder has them under other names or in other shapes than the model:
        then transformers alone knows how to load them.
    """
    if gguf := gguf_in(folder):
        return _marked(_dequantized(gguf, model), model)
    files = _files(folder)
    found: dict[str, Source] = {}
    for name, weight in _weights(model).items():
        file = files.get(name)
        if file is None:
            return None
        try:
            with safe_open(file, "pt") as opened:
                if tuple(opened.get_slice(name).get_shape()) != tuple(weight.shape):
                    return None
        except (OSError, SafetensorError):
            return None

        def rows(start: int, end: int, name: str = name, file: Path = file) -> Tensor:
            with safe_open(file, "pt") as opened:
                part = opened.get_slice(name)
                return opened.get_tensor(name) if not part.get_shape() else part[start:end]

        found[name] = Source(tuple(weight.shape), rows, False, _counts(weight))
    return _marked(found, model)


def _dequantized(gguf: list[Path], model: Any) -> dict[str, Source]:
    """The weights of a model as they lie in a GGUF file; what is not there is the model's own."""
    weights = GGUFWeights(gguf, model)
    found = {}
    for name, weight in _weights(model).items():

        def rows(start: int, end: int, name: str = name, own: Tensor = weight) -> Tensor:
            if name in weights.names:
                return torch.from_numpy(np.ascontiguousarray(weights.rows(name, start, end)))
            return own.detach() if not own.dim() else own.detach()[start:end]

        found[name] = Source(tuple(weight.shape), rows, False, _counts(weight))
    return found


def sources_of(model: Any) -> dict[str, Source]:
    """The weights of a model that is loaded, likewise."""
    found = {}
    for name, weight in _weights(model).items():

        def rows(start: int, end: int, weight: Tensor = weight) -> Tensor:
            return weight.detach() if not weight.dim() else weight.detach()[start:end]

        found[name] = Source(tuple(weight.shape), rows, False, _counts(weight))
    return _marked(found, model)


def model_from(file: WeightFile, config: Any) -> Any:
    """A model of transformers that runs by the weights of a file.

    Raises:
        KeyError: the file has not all of its weights.
    """
    model = empty_model(config)
    wanted = _weights(model)
    names = _names(model, wanted)  # before the modules change
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and names[module.weight] in file.matrices:
            bias = None if module.bias is None else names[module.bias]
            made: Any = EightBitLinear(file, names[module.weight], bias)
        elif _is_embedding(module) and names[module.weight] in file.matrices:
            scale = float(getattr(module, "scalar_embed_scale", 1.0))
            made = EightBitEmbedding(file, names[module.weight], scale)
        else:
            continue
        model.set_submodule(name, made)
    for name, weight in _weights(model).items():
        module, _, last = name.rpartition(".")
        owner = model.get_submodule(module)
        value = file.tensor(name)
        if isinstance(weight, torch.nn.Parameter):
            owner.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(last, value.to(weight.dtype))
    return model


def _weights(model: Any) -> dict[str, Tensor]:
    """What a model saves, each once where several modules share it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _names(model: Any, wanted: Mapping[str, Tensor]) -> dict[Tensor, str]:
    return {tensor: name for name, tensor in wanted.items()}


def _counts(weight: Tensor) -> bool:
    return isinstance(weight, torch.nn.Parameter)


def _marked(sources: dict[str, Source], model: Any) -> dict[str, Source]:
    """The same, those marked that are rounded: matrices of linear layers and of embeddings."""
    names = _names(model, _weights(model))
    matrices = {
        names[module.weight]
        for module in model.modules()
        if type(module) in (torch.nn.Linear, Linear) or _is_embedding(module)
    }
    return {
        name: Source(one.shape, one.rows, name in matrices, one.counts)
        for name, one in sources.items()
    }


def _is_embedding(module: Any) -> bool:
    """Whether a module looks rows up, and does nothing else but to multiply them by a number."""
    kind = type(module)
    return kind is torch.nn.Embedding or (
        issubclass(kind, torch.nn.Embedding) and hasattr(module, "scalar_embed_scale")
    )


def _files(folder: Path) -> dict[str, Path]:
    """In which file of a folder each tensor is."""
    index = folder / _INDEX
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in names.items()}
        if (folder / _WHOLE).is_file():
            with safe_open(folder / _WHOLE, "pt") as opened:
                return dict.fromkeys(opened.keys(), folder / _WHOLE)
    except (OSError, ValueError, KeyError, SafetensorError):
        pass
    return {}
