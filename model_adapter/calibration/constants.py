"""Which constants memories are weighed by: those that a database records, the catalogue's, or safe
ones."""

from __future__ import annotations

from memdb import MemDB
from model_adapter.catalog import CATALOG
from model_adapter.language_model import LanguageModel
from model_adapter.weighing import SAFE, Weighing

#: The setting of a database that records a calibration.
SETTING = "calibration"


def weighing_of(db: MemDB, model: LanguageModel) -> Weighing:
    """How the memories of a database count for the model that wrote them.

    What `memdb calibrate` recorded comes first, if it was for this model and this adapter; then the
    catalogue's constants for the model; then safe ones.
    """
    recorded = db.settings.get(SETTING)
    adapter = None if model.adapter is None else model.adapter.fingerprint
    if recorded is not None and (recorded["model"], recorded["adapter"]) == (
        model.fingerprint,
        adapter,
    ):
        return Weighing.from_json(recorded["weighing"])
    entry = CATALOG.get(model.name)
    return SAFE if entry is None or entry.weighing is None else entry.weighing
