"""Measuring on passages that were kept out of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memdb import Progress
from model_adapter.training.passage_losses import PassageLosses
from model_adapter.training.passages import Passage
from model_adapter.training.record import Log


class Measuring:
    """What memories are worth: (nothing - memory) / (nothing - text), of mean negative
    log-likelihoods of answers. At 1 memories are as good as the text in the prompt. An adapter may
    come above that: memories can also tell what form answers have, which the text does not.

    Args:
        passages: that were kept out.
        lessons: what the model makes of them.
        log: gets a line with nothing, with the text and without the adapter, which are measured
            once; and one for each measurement.
        progress: told of the former.
    """

    def __init__(
        self, passages: Sequence[Passage], lessons: PassageLosses, log: Log, progress: Progress
    ) -> None:
        self._passages = passages
        self._lessons = lessons
        self._log = log
        self._bounds: dict[str, Any] = (
            (log.find("bounds") or self._measure_bounds(progress)) if (passages) else {}
        )

    @property
    def untrained(self) -> float | None:
        """What they are worth without the adapter; None without passages."""
        return self._bounds.get("share_untrained")

    def measure(self, step: int) -> float:
        """What they are worth now; a line of the log."""
        found = [self._lessons.figures(passage) for passage in self._passages]
        kl, nll = (sum(values) / len(found) for values in zip(*found, strict=True))
        share = _share(self._bounds, nll)
        self._log.write({"measured": True, "step": step, "kl": kl, "nll": nll, "share": share})
        return share

    def _measure_bounds(self, progress: Progress) -> dict[str, Any]:
        lessons, count = self._lessons, len(self._passages)
        means = {"nothing": 0.0, "text": 0.0, "untrained": 0.0}
        for number, passage in enumerate(self._passages):
            progress("measuring without", number, count)
            means["nothing"] += lessons.nothing(passage) / count
            means["text"] += lessons.text(passage) / count
            means["untrained"] += lessons.untrained(passage) / count
        progress("measuring without", count, count)
        share = _share(means, means["untrained"])
        line = {"bounds": True, "step": 0, "passages": count, **means, "share_untrained": share}
        self._log.write(line)
        return line


def _share(bounds: dict[str, Any], nll: float) -> float:
    gain = bounds["nothing"] - bounds["text"]
    return float((bounds["nothing"] - nll) / gain) if gain else float("nan")
