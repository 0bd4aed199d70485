"""Which files a GGUF model is of: one, or the parts that llama.cpp splits it into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from memdb import InvalidInputError

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
#: Of a model that sees: its eyes lie in a file of their own.
_EYES = "mmproj"
#: What Hugging Face keeps weights in.
_OTHERS = ("*.safetensors", "*.bin", "*.index.json")


def parts_of(file: Path) -> list[Path]:
    """A GGUF file, or all parts of the model that it is one of.

    Raises:
        InvalidInputError: one is not there.
    """
    matched = _PART.fullmatch(file.name)
    if matched is None:
        parts = [file]
    else:
        stem, _, count = matched.groups()
        parts = [
            file.with_name(f"{stem}-{number:05}-of-{count}{file.suffix}")
            for number in range(1, int(count) + 1)
        ]
    lacking = [part for part in parts if not part.is_file()]
    if lacking:
        raise InvalidInputError(f"there is no GGUF file '{lacking[0]}'" + _of(parts))
    return parts


def parts_in(folder: Path) -> list[Path]:
    """The GGUF model in a folder; empty: there is none, or weights as Hugging Face keeps them.

    Raises:
        InvalidInputError: there are several, or a part of it is not there.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() == SUFFIX and not file.name.lower().startswith(_EYES)
    )
    if not files or any(any(folder.glob(pattern)) for pattern in _OTHERS):
        return []
    parts = parts_of(files[0])
    others = [file.name for file in files if file not in parts]
    if others:
        raise InvalidInputError(
            f"the folder '{folder}' holds several GGUF models: name one of its files, for example "
            f"'{files[0]}' or '{folder / others[0]}'"
        )
    return parts


def _of(parts: Sequence[Path]) -> str:
    if len(parts) == 1:
        return ""
    return f", one of the {len(parts)} parts of the model: put all of them into one folder"
