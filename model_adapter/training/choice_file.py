"""Which pairs references keep: found by the model's own weights, once, and kept in a file.

Training does not change what is chosen, so a reference that comes again needs no pass for it. The
file is records of one size, each (reference and budget) under a hash, appended as they are made; a
last one that is cut off is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from memdb import Framing, InvalidInputError, StorageError
from model_adapter.models.language_model import LanguageModel
from model_adapter.training.corpus import Reference
from model_adapter.training.recipe import Recipe
from model_adapter.writing.kept_pairs import Choice
from model_adapter.writing.writer import Writer

_HASH = 16  # bytes
_BATCH = 8  # references to a pass


class ChoiceFile:
    """Of one model, by framing and budget.

    Args:
        model: without an adapter.
        recipe: whose framings, budgets and selection.
        file: where they are kept.

    Raises:
        InvalidInputError: a budget or a framing is not one of this model.
        StorageError: the file cannot be written.
    """

    def __init__(self, model: LanguageModel, recipe: Recipe, file: Path) -> None:
        self._model = model
        self._file = file
        self._writers = {
            framing: [
                Writer(
                    model,
                    framing=framing,
                    selection=recipe.selection,
                    budget=budget,
                    spread=recipe.spread,
                )
                for budget in sorted(set(recipe.budgets))
            ]
            for framing in recipe.framings
        }
        shape = next(iter(self._writers.values()))[0].shape
        self._places = (shape.rows, shape.reference_length)
        self._bytes = -(-shape.rows * shape.reference_length // 8)
        weights = next(iter(self._writers.values()))[0].head_weights
        self._head = f"{model.fingerprint} {recipe.selection} {recipe.spread} {shape.layers}"
        if weights is not None:
            self._head += f" {weights}"
        self._known: dict[bytes, np.ndarray] = {}
        self._read()

    def writer(self, framing: Framing) -> Writer:
        """One that writes in a framing."""
        return self._writers[framing][0]

    def of(self, references: Sequence[Reference], framing: Framing, budget: int) -> list[Choice]:
        """The choices of references, found if they are not known."""
        missing = [r for r in references if self._key(r, framing, budget) not in self._known]
        for start in range(0, len(missing), _BATCH):
            self._find(missing[start : start + _BATCH], framing)
        return [self._choice(reference, framing, budget) for reference in references]

    def _choice(self, reference: Reference, framing: Framing, budget: int) -> Choice:
        packed = self._known[self._key(reference, framing, budget)]
        count = self._places[0] * self._places[1]
        kept = np.unpackbits(packed, count=count).view(bool).reshape(self._places)
        return Choice(torch.from_numpy(kept[:, : len(reference.tokens)].copy()))

    def _find(self, references: Sequence[Reference], framing: Framing) -> None:
        writers = self._writers[framing]
        tokens = [list(reference.tokens) for reference in references]
        scores = writers[0].scores(tokens)
        made: list[bytes] = []
        for writer in writers:
            budget = writer.selection.budget
            choices = writer.choices(scores, tokens)
            for reference, choice in zip(references, choices, strict=True):
                every = np.zeros(self._places, bool)
                every[:, : len(reference.tokens)] = choice.kept.cpu().numpy()
                packed = np.packbits(every)
                key = self._key(reference, framing, budget)
                self._known[key] = packed
                made.append(key + packed.tobytes())
        try:
            with self._file.open("ab") as file:
                file.write(b"".join(made))
        except OSError as error:
            raise StorageError(f"cannot write '{self._file}': {error.strerror}") from error

    def _key(self, reference: Reference, framing: Framing, budget: int) -> bytes:
        prefix = self.writer(framing).shape.prefix
        said = f"{self._head} {prefix} {budget} {reference.tokens}"
        return xxhash.xxh3_128_digest(said.encode())

    def _read(self) -> None:
        size = _HASH + self._bytes
        try:
            data = self._file.read_bytes() if self._file.exists() else b""
            whole = len(data) - len(data) % size
            if whole != len(data):
                self._file.write_bytes(data[:whole])
        except OSError as error:
            raise InvalidInputError(f"cannot read '{self._file}': {error.strerror}") from error
        for start in range(0, whole, size):
            record = data[start : start + size]
            self._known[record[:_HASH]] = np.frombuffer(record, np.uint8, offset=_HASH)
