"""Which constants memories are weighed by: those that a database records, the catalogue's, or safe
ones."""

from __future__ import annotations

from memdb import InvalidInputError, MemDB
from model_adapter.attention.weighing import SAFE, Weighing
from model_adapter.catalog import ADAPTERS, CATALOG
from model_adapter.models.language_model import LanguageModel

#: The setting of a database that records a calibration.
SETTING = "calibration"


def weighing_of(db: MemDB, model: LanguageModel) -> Weighing:
    """How the memories of a database count for the model that wrote them.

    What `memdb calibrate` recorded comes first, if it was for this model and this adapter; then the
    catalogue's constants for the model; then safe ones.

    Raises:
        InvalidInputError: a later release recorded constants that this one does not know.
    """
    recorded = db.settings.get(SETTING)
    if recorded is None or (recorded["model"], recorded["adapter"]) != identity(model):
        return uncalibrated(model)
    try:
        return Weighing.from_json(recorded["weighing"])
    except InvalidInputError as error:
        raise InvalidInputError(
            f"the calibration that '{db.path}' records cannot be used: {error}. Calibrate anew "
            "(memdb calibrate), or remove it (memdb calibrate --reset)"
        ) from error


def uncalibrated(model: LanguageModel) -> Weighing:
    """Constants of a model that no calibration is recorded for: its adapter's, or its own."""
    adapter = None if model.adapter is None else ADAPTERS.get(model.adapter.name)
    for entry in (adapter, CATALOG.get(model.name)):
        if entry is not None and entry.weighing is not None:
            return entry.weighing
    return SAFE


def identity(model: LanguageModel) -> tuple[str, str | None]:
    """Fingerprints of a model and of its adapter: a calibration is for these."""
    return model.fingerprint, None if model.adapter is None else model.adapter.fingerprint
