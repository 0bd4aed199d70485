"""An option that was."""

from __future__ import annotations

import warnings


def warn_of_fast() -> None:
    """Say what became of an option that was `fast=True`."""
    warnings.warn(
        "'fast' does nothing any more: models on a CPU read by weights of 8 bits, which is faster; "
        "exact=True reads by the exact ones",
        DeprecationWarning,
        stacklevel=3,
    )
