"""How an adapter is trained: all that decides which weights come out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from memdb import Framing, InvalidInputError
from model_adapter.models.adapters import AdapterPath
from model_adapter.selections import DEFAULT_SELECTION, SPREADS, Spread, selection_named

#: What may differ when a run that was interrupted goes on.
_MAY_DIFFER = ("steps", "hours", "evaluate_every", "checkpoint_minutes")

# What runs did that say nothing of it.
_BEFORE = {"short": 0.0, "unrelated": 0.0}


@dataclass(frozen=True)
class Recipe:
    """Of a training run.

    Attributes:
        path: when the adapter is active: `write`, `read`, or `both`.
        steps: how many; None: as `hours` says.
        hours: how long to train, the pauses between interrupted runs left out.
        rank: of the low-rank changes.
        alpha: their scale, in units of 1 / rank; None: twice the rank.
        targets: names of linear layers to change, e.g. `q_proj`; empty: all within the layers.
        lr: the largest learning rate; after the warm-up it falls to 0 by a cosine.
        warmup: share of the run in which the learning rate rises.
        batch: passages to a step.
        examples: about each passage.
        references: the least and the most references in memory, those of the passage among them.
        gold: most references of one passage.
        short: share of passages whose references are a few sentences each.
        unrelated: share of passages whose text is read behind other references alone.
        framings: of which each passage gets one.
        budgets: likewise; pairs kept of a reference of 128 tokens.
        selection: which pairs are kept.
        spread: where the budget is spent; None: as the selection does.
        kl_weight: of the divergence from the model that has the passage as text in its prompt.
        nll_weight: of the answers' negative log-likelihood.
        prompt_weight: of the divergence on a prompt's tokens, beside 1 on an answer's.
        clip: the largest norm of a gradient.
        self_questions: passages about which the model itself asks and answers.
        held_out: passages that are kept out of training, to measure by.
        evaluate_every: steps between two measurements.
        checkpoint_minutes: between two checkpoints.
        seed: of all that is drawn.
        dtype: the adapter's numbers on disk: `float16` or `float32`.
    """

    path: AdapterPath = "write"
    steps: int | None = None
    hours: float | None = None
    rank: int = 16
    alpha: int | None = None
    targets: tuple[str, ...] = ()
    lr: float = 2e-4
    warmup: float = 0.03
    batch: int = 1
    examples: int = 6
    references: tuple[int, int] = (1, 5)
    gold: int = 3
    short: float = 0.0
    unrelated: float = 0.0
    framings: tuple[Framing, ...] = ("plain", "chat")
    budgets: tuple[int, ...] = (360, 720, 1440)
    selection: str = DEFAULT_SELECTION
    spread: Spread | None = None
    kl_weight: float = 0.5
    nll_weight: float = 1.0
    prompt_weight: float = 0.2
    clip: float = 1.0
    self_questions: int = 64
    held_out: int = 24
    evaluate_every: int = 200
    checkpoint_minutes: float = 5.0
    seed: int = 0
    dtype: str = "float16"

    def __post_init__(self) -> None:
        low, high = self.references
        wrong = {
            "path is 'write', 'read' or 'both'": self.path not in get_args(AdapterPath),
            "give either steps or hours": (self.steps is None) == (self.hours is None),
            "steps are at least 1": self.steps is not None and self.steps < 1,
            "hours are more than 0": self.hours is not None and not self.hours > 0,
            "references are 1 to N": not 1 <= low <= high,
            "framings are 'plain' and 'chat'": not self.framings
            or not set(self.framings) <= set(get_args(Framing)),
            "budgets are at least 1": not self.budgets or min(self.budgets) < 1,
            "dtype is 'float16' or 'float32'": self.dtype not in ("float16", "float32"),
            f"spread is one of {', '.join(SPREADS)}": self.spread not in (None, *SPREADS),
            "warmup is 0 to 1": not 0 <= self.warmup <= 1,
            "short and unrelated are shares, together at most 1": not (
                0 <= min(self.short, self.unrelated) <= self.short + self.unrelated <= 1
            ),
        }
        for name in ("rank", "batch", "examples", "gold", "evaluate_every"):
            wrong[f"{name} is at least 1"] = getattr(self, name) < 1
        for name in ("self_questions", "held_out", "seed", "kl_weight", "nll_weight"):
            wrong[f"{name} is not below 0"] = getattr(self, name) < 0
        for name in ("prompt_weight", "checkpoint_minutes"):
            wrong[f"{name} is not below 0"] = getattr(self, name) < 0
        for name in ("lr", "clip"):
            wrong[f"{name} is more than 0"] = not getattr(self, name) > 0
        if self.kl_weight == self.nll_weight == 0:
            wrong["kl_weight or nll_weight is more than 0"] = True
        found = [rule for rule, broken in wrong.items() if broken]
        if found:
            raise InvalidInputError(f"recipe of training: {'; '.join(found)}")
        selection_named(self.selection)

    @property
    def scale(self) -> int:
        """alpha, or its default."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def require_same(self, recorded: Mapping[str, Any], folder: str) -> None:
        """Raise `InvalidInputError` unless a run with a recorded recipe may go on with this one."""
        mine = self.to_json()
        for part in fields(self):
            name = part.name
            recorded_so = recorded.get(name, _BEFORE.get(name))
            if name not in _MAY_DIFFER and recorded_so != mine[name]:
                raise InvalidInputError(
                    f"'{folder}' holds a run with {name} {json.dumps(recorded_so)}, not "
                    f"{json.dumps(mine[name])}: give the same recipe to go on with it, or another "
                    "folder"
                )
