"""Checkpoints: where a run is, in one safetensors file that is replaced in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memdb import InvalidInputError, StorageError

_PARTS = ("weight", "exp_avg", "exp_avg_sq")  # the last two are AdamW's


@dataclass(frozen=True)
class Progressed:
    """How far a run came.

    Attributes:
        step: steps that are done.
        seconds: that they took.
        recipe: what it is a run of.
    """

    step: int
    seconds: float
    recipe: Mapping[str, Any]


def save(
    file: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progressed: Progressed,
) -> None:
    """Write a checkpoint in the place of the one before.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors[f"weight {name}"] = parameter.detach()
        for part in _PARTS[1:]:
            if part in state:
                tensors[f"{part} {name}"] = state[part]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    temporary = file.with_suffix(".new")
    try:
        save_file(tensors, temporary, {"progress": json.dumps(vars(progressed))})
        os.replace(temporary, file)  # noqa: PTH105
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write the checkpoint '{file}': {error}") from error


def load(
    file: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Take weights and optimizer from a checkpoint.

    Raises:
        InvalidInputError: it is damaged, or of another model.
    """
    done = peek(file)
    assert done is not None
    try:
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
            for name, parameter in parameters.items():
                with torch.no_grad():
                    parameter.copy_(stored.get_tensor(f"weight {name}"))
                if f"{_PARTS[1]} {name}" in names:
                    state: dict[str, Any] = {"step": torch.tensor(float(done.step))}
                    for part in _PARTS[1:]:
                        state[part] = stored.get_tensor(f"{part} {name}").to(parameter.device)
                    optimizer.state[parameter] = state
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InvalidInputError(f"the checkpoint '{file}' cannot be read: {error}") from error


def peek(file: Path) -> Progressed | None:
    """How far the run of a checkpoint came; None: there is none.

    Raises:
        InvalidInputError: it is damaged.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            said = json.loads(stored.metadata()["progress"])
            return Progressed(**said)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"the checkpoint '{file}' cannot be read: {error}. Delete it to begin anew, or train "
            "into another folder"
        ) from error
