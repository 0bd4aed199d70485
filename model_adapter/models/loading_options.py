"""How a model is loaded, as keywords, and what is said of those that cannot be. Nothing here waits
for torch."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypedDict

from memdb import InvalidInputError
from model_adapter.catalog import in_brief

if TYPE_CHECKING:
    import torch


class LoadingOptions(TypedDict, total=False):
    """How a model is loaded, as keywords; see `Loading`."""

    device: str | torch.device | None
    dtype: str | torch.dtype | None
    device_map: str | dict[str, Any] | None
    threads: int | None
    revision: str | None
    quantization_config: Any
    trust_remote_code: bool
    exact: bool
    fast: bool


def warn_of_fast() -> None:
    """Say what became of an option that was `fast=True`."""
    warnings.warn(
        "'fast' does nothing any more: models on a CPU read by weights of 8 bits, which is faster; "
        "exact=True reads by the exact ones",
        DeprecationWarning,
        stacklevel=3,
    )


def require_device(device: str | torch.device) -> None:
    """Raise `InvalidInputError` unless torch has this device here."""
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:  # an unknown name, or no such device: torch has no common error
        raise InvalidInputError(
            f"there is no device '{device}' here ({in_brief(error):.60}); give cpu, or none"
        ) from error


def require_no_code(what: str, name: str, error: Exception) -> None:
    """Raise `InvalidInputError` if an error of loading says that code of its own is not allowed."""
    if "trust_remote_code" in str(error):
        raise InvalidInputError(
            f"the {what} '{name}' brings code of its own, which would run here with all your "
            "rights. Read it; then allow it by trust_remote_code=True (--trust-remote-code)"
        ) from error
