"""Arguments at the door: what is no number, no flag, no path is an `InvalidInputError` that names
the argument. Numbers and booleans may be numpy's; a boolean is no number."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from memdb.errors import InvalidInputError
from memdb.types.shown import shown_value

_T = TypeVar("_T")


def whole_number(value: object, name: str, least: int, most: int | None = None) -> int:
    """A whole number of at least `least` and at most `most`."""
    given = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not given or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        limit = "" if most is None else f" and at most {most}"
        raise InvalidInputError(
            f"{name} must be a whole number of at least {least}{limit}, got {shown_value(value)}"
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(value: object, name: str, above: float, most: float) -> float:
    """A number of more than `above` and at most `most`; NaN is none."""
    given = isinstance(value, (int, float, np.integer, np.floating))
    if not given or isinstance(value, bool) or not above < value <= most:  # type: ignore[operator]
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise InvalidInputError(
            f"{name} must be a number of more than {above:g}{limit}, got {shown_value(value)}"
        )
    return float(value)  # type: ignore[arg-type]


def flag(value: object, name: str) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidInputError(f"{name} must be True or False, got {shown_value(value)}")
    return bool(value)


def one_of(value: object, name: str, choices: Collection[str]) -> None:
    """Refuse what is not one of these texts."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidInputError(f"{name} is one of {', '.join(choices)}; got {shown_value(value)}")


def function(value: object, name: str) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise InvalidInputError(f"{name} must be a function, got {shown_value(value)}")


def a(kind: type[_T], value: object, name: str) -> _T:
    """A value of that class."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InvalidInputError(
            f"{name} must be {article} {kind.__name__}, got {shown_value(value)}"
        )
    return value


def some(value: object, name: str, of: str) -> Iterable[Any]:
    """Something to iterate over; a text, bytes or a mapping is meant as one thing."""
    if isinstance(value, (list, tuple)):  # nearly always; the rest takes a while to ask about
        return value
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise InvalidInputError(f"{name} must be several {of}, got {shown_value(value)}")
    return value


def path(value: object, name: str) -> Path:
    """A path that the system can be asked about."""
    text = value if isinstance(value, str) else None
    if isinstance(value, os.PathLike):
        text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise InvalidInputError(f"{name} must be a path, got {shown_value(value)}")
    if "\0" in text:
        raise InvalidInputError(f"{name} contains a zero character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{name} has half a surrogate pair, which is no path") from error
    return Path(text)
