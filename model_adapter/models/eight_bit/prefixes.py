"""What a prefix leaves behind by the exact weights, computed once and kept in the cache folder.

Memories are written by the exact weights, behind their database's prefix. What is read attends to
that prefix and to the memories side by side, so the prefix is read as it was when they were
written. By weights of 8 bits its first token (an attention sink, with the largest keys of all)
comes out a little different, and all memories count for too much or too little beside it:
Qwen2.5-Coder-0.5B in the plain framing gives running text a perplexity of 35.9 by its exact
weights, 38.6 by those of 8 bits, and 36.1 by those of 8 bits behind the exact prefix.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_adapter.attention.carried import KeyValues, State
from model_adapter.catalog import cache_folder

_FOLDER = "prefixes"
_FORMAT = 1
#: Files that are kept, those that were used last. One has about a megabyte.
_MOST = 256


def kept_prefix(
    of: Sequence[Any], tokens: Sequence[int], compute: Callable[[], KeyValues]
) -> KeyValues:
    """A prefix's key-values (and states) as they are kept; else as computed, and kept from now on.

    Args:
        of: what the weights that compute it are known by.
        tokens: ids.
        compute: gives them.
    """
    about = json.dumps([_FORMAT, *of, list(tokens)])
    path = cache_folder() / _FOLDER / f"{xxhash.xxh3_128_hexdigest(about.encode())}.safetensors"
    with suppress(OSError, SafetensorError, KeyError, ValueError):
        found = _read(path)
        os.utime(path)
        return found
    made = compute()
    with suppress(OSError):  # where nothing can be kept, it is computed again
        _write(path, made)
    return made


def _read(path: Path) -> KeyValues:
    with safe_open(path, "pt") as file:
        names = {tuple(name.split(".")): name for name in file.keys()}  # noqa: SIM118 (no mapping)
        tensors = {where: file.get_tensor(name) for where, name in names.items()}
    pairs = {
        int(layer): (tensors[layer, "keys"], tensors[layer, "values"])
        for layer, *kind in tensors
        if kind == ["keys"]
    }
    states: dict[int, State] = {}
    for (layer, kind, *number), tensor in tensors.items():
        if number:
            state = states.setdefault(int(layer), State({}, {}))
            getattr(state, kind)[int(number[0])] = tensor
    return KeyValues(pairs, states)


def _write(path: Path, made: KeyValues) -> None:
    tensors: dict[str, Tensor] = {}
    for layer, pair in made.pairs.items():
        tensors |= {f"{layer}.{name}": x for name, x in zip(("keys", "values"), pair, strict=True)}
    for layer, state in made.states.items():
        tensors |= {f"{layer}.conv.{number}": x for number, x in state.conv.items()}
        tensors |= {f"{layer}.recurrent.{number}": x for number, x in state.recurrent.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as folder:
        save_file({name: x.contiguous() for name, x in tensors.items()}, Path(folder) / path.name)
        (Path(folder) / path.name).replace(path)
    kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
    for old in kept[_MOST:]:
        old.unlink(missing_ok=True)
