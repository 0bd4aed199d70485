"""What was tried out before on this machine: the passes of a trial take a moment at each loading.

A model that passed is remembered in the cache folder, with what it turned out to be, by all that a
trial depends on: its class and configuration, where and in what it computes, and the libraries. One
that failed is not: it fails again, with its reason.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash

from model_adapter.catalog import cache_folder
from model_adapter.models.probe import Found

_TRIAL = 4  # which trial: another number when `probe` tries other things, or attention changes


def was_tried(model: Any, exact: bool) -> Found | None:
    """What a model, in eager or any other attention of its own, turned out to be when it passed: by
    its exact weights, or by those of 8 bits. None: it has not."""
    try:
        return Found.read(json.loads(_mark(model, exact).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):  # it is not there, or was cut off
        return None


def note_tried(model: Any, exact: bool, found: Found) -> None:
    """Remember that it has. Where the folder cannot be written it is tried each time."""
    mark = _mark(model, exact)
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(found.noted), encoding="utf-8")


def _mark(model: Any, exact: bool) -> Path:
    of = (
        _TRIAL,
        transformers.__version__,
        torch.__version__,
        f"{type(model).__module__}.{type(model).__qualname__}",
        model.config.to_json_string(use_diff=False),
        str(model.dtype) if exact else "8 bits",
        model.device.type,
    )
    return cache_folder() / "tried" / str(xxhash.xxh3_128_hexdigest(repr(of).encode()))
