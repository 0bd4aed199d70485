"""Reading files that somebody else may have written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from memdb.errors import InvalidInputError

_SMALL = 1 << 28  # bytes


def is_regular(path: Path) -> bool:
    """Whether a file is there that has an end: no folder, no pipe."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a folder that may not be read, a zero in it
        return False


def require_regular(path: Path) -> None:
    """Raise `InvalidInputError` unless `is_regular`."""
    if not is_regular(path):
        raise InvalidInputError(
            f"'{path}' is missing, or no file. Copy the whole folder, or export again"
        )


def read_small(path: Path) -> bytes:
    """A file of at most 256 MiB; `InvalidInputError` if it is missing, too large or unreadable."""
    require_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(_SMALL + 1)
    except OSError as error:
        raise cannot_read(path, error) from error
    if len(data) > _SMALL:
        raise InvalidInputError(f"'{path}' has more than {_SMALL} bytes")
    return data


def cannot_read(path: Path, error: OSError) -> InvalidInputError:
    """What to raise when the system refuses."""
    return InvalidInputError(f"cannot read '{path}': {error.strerror or error}")


def decoded(data: bytes) -> str:
    """UTF-8; `InvalidInputError` if it is not."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"not UTF-8 (byte {error.start + 1})") from error


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object from its bytes; `InvalidInputError` if they are none."""
    try:
        values = json.loads(decoded(data))
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    except InvalidInputError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deep, or a number too long
        raise InvalidInputError(f"not JSON that can be read: {error}") from error
    if not isinstance(values, dict):
        raise InvalidInputError("not a JSON object")
    return values


def is_integer(value: object, least: int, most: int) -> bool:
    """Whether a JSON value is an integer in a range; true and false are none."""
    return type(value) is int and least <= value <= most


def is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_checksum(value: object) -> bool:
    """Whether it is 64 bits in hexadecimal, lower case."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def short(value: object) -> str:
    """A JSON value for an error's text."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
