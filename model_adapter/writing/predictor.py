"""Predictors of contributions: the file that `memdb predictor` writes, the catalogue's, and those
that databases record.

A predictor has coefficients for each (layer, kv head): see `selections.PredictedContribution`. The
file is of safetensors, with the tensor `coefficients`, (layers, kv heads, features + 1) float32,
and what it was fitted to as metadata.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memdb import InvalidInputError, StorageError
from model_adapter.catalog import CATALOG
from model_adapter.models.language_model import LanguageModel
from model_adapter.selections import DEFAULT_SELECTION, PredictedContribution
from model_adapter.selections.predicted import feature_count

COMMAND = "memdb predictor"
_TENSOR, _ABOUT = "coefficients", "about"


@dataclass(frozen=True)
class Predictor:
    """Coefficients for each (memory layer, kv head).

    Attributes:
        coefficients: (rows, features + 1) float32, layer by layer.
    """

    coefficients: Tensor

    def by_layer(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """(kv heads, features + 1) of each of the memory layers."""
        parts = self.coefficients.view(len(layers), -1, self.coefficients.shape[1])
        return dict(zip(layers, parts, strict=True))

    def to_json(self) -> str:
        """The coefficients as little-endian float32, row by row, in base64."""
        numbers = self.coefficients.numpy().astype("<f4")
        return base64.b64encode(numbers.tobytes()).decode("ascii")

    @classmethod
    def from_json(cls, text: str, model: LanguageModel, layers: Sequence[int]) -> Predictor:
        """What `to_json` gave, or `InvalidInputError`: it is of other layers, or damaged."""
        shape = len(layers) * model.kv_heads, feature_count(model) + 1
        try:
            numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(shape)
        except (binascii.Error, ValueError) as error:
            raise InvalidInputError(
                f"a predictor for {len(layers)} layers of '{model.name}' has {shape[0]} x "
                f"{shape[1]} numbers, and this one has not"
            ) from error
        return cls(torch.tensor(numbers.astype(np.float32)))


#: As it is given: a file, or what a database records.
GivenPredictor = Path | str


def selection_for(name: str | None, given: GivenPredictor | None) -> str:
    """The selection of that name; None: `predicted` if a predictor is given, else the default."""
    if name is not None:
        return name
    return DEFAULT_SELECTION if given is None else PredictedContribution.name


def predictor_for(
    given: GivenPredictor | None, model: LanguageModel, layers: Sequence[int], selection: str
) -> Predictor | None:
    """The predictor that a selection takes; None: it takes none.

    Args:
        given: as it is given; None: the catalogue's for this model.
        model: whose contributions.
        layers: the memory layers.
        selection: its name.

    Raises:
        InvalidInputError: there is none, it is of another model, or damaged; or the selection takes
            none, and one is given.
    """
    if selection != PredictedContribution.name:
        if given is not None:
            raise InvalidInputError(
                f"a predictor is for the selection '{PredictedContribution.name}', not for "
                f"'{selection}'"
            )
        return None
    if isinstance(given, str):
        return Predictor.from_json(given, model, layers)
    file = given or comes_with(model)
    if file is None:
        raise InvalidInputError(
            f"the selection '{selection}' takes a predictor, and none comes with the model "
            f"'{model.name}': `{COMMAND}` fits one; or use the selection '{DEFAULT_SELECTION}'"
        )
    coefficients, about = read_predictor(file)
    # By its name in the catalogue: the same weights have another fingerprint in another dtype.
    if given is not None and about["fingerprint"] != model.fingerprint:
        raise InvalidInputError(
            f"the predictor in '{file}' was fitted to the model '{about['model']}', not to "
            f"'{model.name}'; fit one to that (`{COMMAND}`)"
        )
    shape = model.layers, model.kv_heads, feature_count(model) + 1
    if coefficients.shape != shape:
        raise InvalidInputError(
            f"'{file}' has coefficients of shape {tuple(coefficients.shape)}, and '{model.name}' "
            f"takes {shape}: `{COMMAND}` makes it anew"
        )
    return Predictor(coefficients[list(layers)].flatten(0, 1))


def write_predictor(path: Path, coefficients: Tensor, about: Mapping[str, Any]) -> None:
    """Write the file.

    Args:
        path: where it is made; replaced, if it is there.
        coefficients: (layers, kv heads, features + 1) float32, of all layers.
        about: what it was fitted to, as JSON: `model` and `fingerprint` at least.

    Raises:
        StorageError: it cannot be written.
    """
    write_tensors(path, {_TENSOR: coefficients.float().contiguous()}, {_ABOUT: json.dumps(about)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of safetensors whole, or leave what was there; `StorageError` if it cannot be
    written."""
    making = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        making.write_bytes(save(tensors, metadata))
        making.replace(path)
    except OSError as error:
        with suppress(OSError):
            making.unlink(missing_ok=True)
        raise StorageError(f"'{path}' cannot be written: {error}") from error


def read_predictor(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Coefficients (layers, kv heads, features + 1) and what they were fitted to.

    Raises:
        InvalidInputError: there is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            if not {"fingerprint", "model"} <= set(about):
                raise KeyError("what it was fitted to")
            coefficients = file.get_tensor(_TENSOR)
    except FileNotFoundError as error:
        raise InvalidInputError(f"there is no '{path}'; `{COMMAND}` makes one") from error
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"'{path}' is not a predictor, or damaged: {error}; `{COMMAND}` makes one"
        ) from error
    return coefficients.float(), about


def comes_with(model: LanguageModel) -> Path | None:
    """The file of the catalogue's predictor for a model; None: it has none."""
    entry = CATALOG.get(model.name)
    return None if entry is None else entry.predictor
