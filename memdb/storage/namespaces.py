"""Where the namespaces of a database lie: each is a database of its own, in the folder `namespaces`
of the one that it belongs to."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from urllib.parse import unquote_to_bytes

from memdb.errors import InvalidInputError, NotADatabaseError, StorageError
from memdb.storage.durable import sync
from memdb.storage.folder import CURRENT, NAMESPACES, exists
from memdb.types.shown import shown_value

MAX_NAME = 80  # bytes; a file name of 255 bytes holds it with every byte escaped

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")
_GONE = "."  # begins what was dropped: no name's folder does


def namespace_folder(database: Path, name: object) -> Path:
    """The folder of a namespace, whether it is there or not.

    Its name is the namespace's in UTF-8, where every byte but lower-case letters, digits, `-` and
    `_` is `%` and two hexadecimal digits: some file systems do not tell capitals from others.

    Raises:
        InvalidInputError: no namespace can have this name, or this is a namespace itself.
    """
    if not isinstance(name, str):
        raise InvalidInputError(f"a namespace's name is a string, got {shown_value(name)}")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the namespace {name!r} has half a surrogate pair") from error
    if not 1 <= len(encoded) <= MAX_NAME:
        raise InvalidInputError(
            f"the namespace {name!r:.100} has {len(encoded)} bytes of UTF-8; a name has 1 to "
            f"{MAX_NAME}"
        )
    above = database.absolute().parent
    if above.name == NAMESPACES and (above.parent / CURRENT).exists():
        raise InvalidInputError(f"'{database}' is a namespace, which has none of its own")
    escaped = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in encoded)
    return database / NAMESPACES / escaped


def namespace_names(database: Path) -> list[str]:
    """The namespaces that are there, by name; `StorageError` if they cannot be listed."""
    try:
        entries = [entry for entry in (database / NAMESPACES).iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot list the namespaces of '{database}': {error}") from error
    names = [_name(entry) for entry in entries]
    return sorted(name for name in names if name is not None)


def _name(folder: Path) -> str | None:
    """The namespace that a folder is; None if it is none, or not a whole one."""
    if folder.name.startswith(_GONE):
        return None
    try:
        name = unquote_to_bytes(folder.name).decode()
        whole = namespace_folder(folder.parent.parent, name) == folder and exists(folder)
    except (ValueError, StorageError):
        return None
    except NotADatabaseError:
        if (folder / CURRENT).exists():
            raise
        return None  # it is being dropped
    return name if whole else None


def remove_namespace(database: Path, name: str) -> None:
    """Remove a namespace at once, for everybody: from one moment on it is not there, and processes
    that have it open are told so.

    Raises:
        StorageError: the disk refuses.
    """
    folder = namespace_folder(database, name)
    gone = folder.parent / f"{_GONE}{secrets.token_hex(8)}"
    try:
        folder.rename(gone)
        sync(folder.parent)
    except OSError as error:
        raise StorageError(
            f"cannot drop the namespace '{name}' of '{database}': {error}"
        ) from error
    remove_dropped(database)


def remove_dropped(database: Path) -> None:
    """Remove what is left of namespaces that are dropped, also of a drop that was killed."""
    for left in (database / NAMESPACES).glob(f"{_GONE}*"):
        shutil.rmtree(left, ignore_errors=True)
