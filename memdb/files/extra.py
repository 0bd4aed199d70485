"""Libraries that read files, of the extra `files`: imported when the first such file comes."""

from __future__ import annotations

import importlib
from typing import Any

from memdb.errors import MissingPartError


def library(module: str, what: str) -> Any:
    """A module of the extra.

    Args:
        module: its name.
        what: what needs it, for who has not installed it.

    Raises:
        MissingPartError: naming the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPartError(
            f"{what} needs the library {module.partition('.')[0]}, which cannot be imported "
            f"({error}). Run: pip install 'explicit-memdb[files]'"
        ) from error
