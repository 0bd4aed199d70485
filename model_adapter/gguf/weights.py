"""The weights of a GGUF model by the names of transformers, some rows at a time.

Names and layouts are transformers' own: its map of names, its processor of an architecture. What
a processor does is asked for some rows only: it changes numbers one by one, or it changes the
order of rows (Llama's queries and keys), which it is asked for with the rows' numbers in their
places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from memdb import InvalidInputError
from model_adapter.gguf.file import Stored, opened

#: Processors that do nothing but what is said above, or put experts side by side, each by itself.
_BY_ROWS = (
    "TensorProcessor",
    "LlamaTensorProcessor",
    "NemotronTensorProcessor",
    "Gemma2TensorProcessor",
    "Lfm2TensorProcessor",
    "Qwen2MoeTensorProcessor",
    "MiniMaxM2TensorProcessor",
)
_ROWS = 1024  # of a tensor that are dequantized at once where all of it is wanted


class GGUFWeights:
    """The weights of a model.

    Args:
        parts: its files.
        model: of transformers, without numbers.

    Attributes:
        names: of what the files hold, as transformers calls it.

    Raises:
        InvalidInputError: the files lack weights of the model, have them in other shapes, in a
            quantization or of an architecture that is not read.
    """

    def __init__(self, parts: Sequence[Path], model: Any) -> None:
        file, tensors = opened(parts)
        architecture = file.fields.get("general.architecture")
        kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        if kind.__name__ not in _BY_ROWS:
            raise InvalidInputError(
                f"the GGUF file '{file.path}' holds a model of the architecture '{architecture}', "
                "whose weights are not read here: take it as a Hugging Face folder"
            )
        self._processor = kind(config=model.config.to_dict())
        self._known: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        self._shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
        self._stored: dict[str, list[Stored]] = {}
        for name, tensor in tensors.items():
            known = self._known.get(name) or self._known.get(name.removesuffix(".weight"))
            if known is not None:
                self._stored.setdefault(known, []).append(tensor)
        self._orders: dict[str, NDArray[np.int64] | None] = {}
        wanted = [name for name, _ in model.named_parameters()]  # tied weights once
        lacking = [name for name in wanted if name not in self._stored]
        if lacking:
            raise InvalidInputError(
                f"the GGUF file '{file.path}' lacks {len(lacking)} of the {len(wanted)} weights of "
                f"a {type(model).__name__}, for example {lacking[0]}: take the model as a Hugging "
                "Face folder"
            )
        self.names = frozenset(self._stored)
        for name in wanted:
            self._require_shape(name)

    def rows(self, name: str, start: int, end: int) -> NDArray[np.float32]:
        """What lies at `start` to `end` along the first axis of a weight."""
        stored = self._stored[name]
        if len(stored[0].shape) == 1:
            return self._vector(name)[start:end]
        order = self._order(name)
        if order is None:
            return self._processed(name, [one.rows(start, end) for one in stored])
        places = order[start:end]
        first = int(places.min())
        return stored[0].rows(first, int(places.max()) + 1)[places - first]

    def whole(self, name: str) -> Tensor:
        """All of a weight, float32."""
        shape = self._shapes[name]
        weight = torch.empty(shape, dtype=torch.float32)
        step = _ROWS if len(shape) == 2 else shape[0] if len(shape) == 1 else 1
        for start in range(0, shape[0], step):
            end = min(start + step, shape[0])
            weight[start:end] = torch.from_numpy(np.ascontiguousarray(self.rows(name, start, end)))
        return weight

    def _order(self, name: str) -> NDArray[np.int64] | None:
        """Which row of the file is each of a weight; None: they are in the same order."""
        if name not in self._orders:
            (one, *others) = self._stored[name]
            order = None
            if not others and len(one.shape) == 2:
                rows = np.arange(one.shape[0])
                numbered = rows.astype(np.float32)[:, None]
                order = self._processed(name, [numbered]).ravel().astype(np.int64)
                order = None if (order == rows).all() else order
            self._orders[name] = order
        return self._orders[name]

    def _processed(self, name: str, values: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Rows of a weight's tensors as transformers has them."""
        made: dict[str, Tensor] = {}
        for one, some in zip(self._stored[name], values, strict=True):
            result = self._processor.process(
                weights=some,
                name=one.name,
                tensor_key_mapping=self._known,
                parsed_parameters={"tensors": made},
            )
            if not made:
                return np.asarray(result.weights, np.float32)
        return np.asarray(made[name].numpy(), np.float32)

    def _vector(self, name: str) -> NDArray[np.float32]:
        one = self._stored[name][0]
        return self._processed(name, [one.rows(0, one.shape[0])])

    def _require_shape(self, name: str) -> None:
        stored, shape = self._stored[name], self._shapes[name]
        for one in stored:
            one.require_readable()
        one = stored[0]
        if len(one.shape) == 1:
            found = self._vector(name).shape
        else:
            found = (one.shape[0], *self.rows(name, 0, 1).shape[1:])
        if found != shape:
            raise InvalidInputError(
                f"the tensor {one.name} of '{one.path}' has the shape {one.shape}, where the "
                f"model's {name} has {shape}: the file is damaged, or not what its head says"
            )
