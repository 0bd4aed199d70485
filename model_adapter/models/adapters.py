"""Adapters: what a model was trained to write memories by (paper, 3.6), as low-rank changes (LoRA)
of its linear layers.

An adapter is a folder as peft writes it (`adapter_config.json`, `adapter_model.safetensors`) with
`recipe.json`, which says what it was made of and how. Most are active while a reference is written
alone (path `write`): what reads, with memories or without, is the model as it was. Those of path
`read` are active in all that is read, behind memories that the model wrote as it was. Those of path
`both` are active everywhere.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file

from memdb import InvalidInputError
from model_adapter.catalog import ADAPTERS, CATALOG, in_brief, source_key

AdapterPath = Literal["write", "read", "both"]

CONFIG, WEIGHTS, RECIPE = "adapter_config.json", "adapter_model.safetensors", "recipe.json"

#: What a command line calls no adapter.
NONE = "none"

# What of peft's configuration changes the numbers.
_SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Attributes:
        name: how to load it again: a name of the catalogue, or a folder.
        folder: where it lies.
        path: when it is active.
        base: fingerprint of the model that it was trained for.
        recipe: how it was trained.
    """

    name: str
    folder: Path
    path: AdapterPath
    base: str
    recipe: Mapping[str, Any]

    @property
    def writes(self) -> bool:
        """Whether memories are written by it; those of a reading adapter are the model's own."""
        return self.path != "read"

    @property
    def reads(self) -> bool:
        """Whether it is active in what is read."""
        return self.path != "write"

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over all that changes the numbers: its weights, their scale, its
        path, and the model that it is for. Memories of another adapter have another."""
        config = json.loads((self.folder / CONFIG).read_text())
        scales = {name: config.get(name) for name in _SCALES}
        head = json.dumps([self.base, self.path, scales], sort_keys=True)
        digest = xxhash.xxh3_128(head.encode())
        for name, weight in sorted(load_file(self.folder / WEIGHTS).items()):
            values = weight.float().contiguous()
            digest.update(f"{name} {tuple(values.shape)}".encode())
            digest.update(memoryview(values.reshape(-1).numpy()))  # type: ignore[arg-type]
        return str(digest.hexdigest())

    def require_base(self, fingerprint: str, model: str) -> None:
        """Raise `InvalidInputError` unless this is for the model with that fingerprint."""
        if fingerprint != self.base:
            trained = self.recipe.get("model")
            raise InvalidInputError(
                f"the adapter '{self.name}' was trained for the model '{trained}' (fingerprint "
                f"{self.base}), not for '{model}' ({fingerprint}); use it with that model, or "
                "train one for this (`memdb train`)"
            )

    def merged(self, model: Any) -> Any:
        """A model with the adapter in its weights; what the adapter does not change, it shares with
        the model that is given."""
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        try:
            with warnings.catch_warnings():  # of what peft asks transformers
                warnings.simplefilter("ignore", FutureWarning)
                adapted = PeftModel.from_pretrained(sharing_copy(model), str(self.folder))
        except Exception as error:  # files and configurations of peft have no common error
            raise InvalidInputError(
                f"the adapter '{self.name}' cannot be used: {in_brief(error)}"
            ) from error
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                linear = layer.get_base_layer()
                own = linear.weight.detach().clone()  # type: ignore[operator]
                linear.weight = torch.nn.Parameter(own, requires_grad=False)
        return adapted.merge_and_unload().eval()


def sharing_copy(model: Any) -> Any:
    """A copy of a model's modules whose parameters and buffers are those of the model itself."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def load_adapter(name: str) -> Adapter:
    """An adapter by a name of the catalogue, or by folder.

    Raises:
        InvalidInputError: there is none, or a file of it is missing or damaged.
    """
    folder = _folder(name)
    if name not in ADAPTERS:
        name = str(folder)
    for file in (CONFIG, WEIGHTS, RECIPE):
        if not (folder / file).is_file():
            raise InvalidInputError(f"the adapter '{name}' is incomplete: '{folder}' has no {file}")
    try:
        recipe = json.loads((folder / RECIPE).read_text())
        path, base = recipe["path"], recipe["fingerprint"]
        config = json.loads((folder / CONFIG).read_text())
        if path not in get_args(AdapterPath) or config["peft_type"] != "LORA":
            raise ValueError("it is of a kind that this release does not know")
        load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else in_brief(error)
        raise InvalidInputError(f"the adapter in '{folder}' cannot be read: {reason}") from error
    return Adapter(name, folder, path, base, recipe)


def _folder(name: str) -> Path:
    entry = ADAPTERS.get(name)
    if entry is None:
        folder = Path(name)
        if not folder.is_dir():
            there = ", ".join(sorted(ADAPTERS)) or "none"
            raise InvalidInputError(
                f"there is no adapter '{name}': it is no folder, and the catalogue has: {there}"
            )
        return folder.resolve()
    if not entry.folder.is_dir():
        raise InvalidInputError(
            f"the adapter '{name}' did not come with this installation; train one with "
            f"`memdb train --model {entry.model}`, and give its folder"
        )
    return entry.folder


def is_there(name: str) -> bool:
    """Whether there is an adapter of that name, or a folder."""
    return (ADAPTERS[name].folder if name in ADAPTERS else Path(name)).is_dir()


def adapter_key(name: str | None) -> object:
    """What tells two adapters apart: where they lie, and when that changed; None: no adapter."""
    if name is None:
        return None
    entry = ADAPTERS.get(name)
    return source_key(name if entry is None else str(entry.folder))


def chosen_adapter(given: str | None, model: str, *, new: bool = False) -> str | None:
    """The adapter to load: the one given, `none` for none; of a new database, if nothing is said,
    the one that the catalogue has for its model, where that is there.

    Args:
        given: a name, a folder, `none`, or None: nothing is said.
        model: the model's name.
        new: whether the database is made now.
    """
    if given is not None:
        return None if given == NONE else given
    entry = CATALOG.get(model)
    default = entry.default_adapter if new and entry is not None else None
    return default if default is not None and is_there(default) else None
