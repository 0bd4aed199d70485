"""Selections: which tokens of which heads of a reference are kept (paper, 3.2).

Each is one small class. `score` sees one layer at a time, `keep` all layers together, so a budget
may be spent evenly or where it counts.
"""

from memdb import InvalidInputError
from model_adapter.selections.base import SPREADS, LayerView, Selection, Spread
from model_adapter.selections.diversity import KeyDiversity
from model_adapter.selections.expected import ExpectedAttention
from model_adapter.selections.looking_back import Contribution, Questions, Reconstruction
from model_adapter.selections.paper import PaperRule
from model_adapter.selections.predicted import PredictedContribution

SELECTIONS: dict[str, type[Selection]] = {
    selection.name: selection
    for selection in (
        PaperRule,
        Reconstruction,
        Contribution,
        PredictedContribution,
        Questions,
        ExpectedAttention,
        KeyDiversity,
    )
}

DEFAULT_SELECTION = Contribution.name

#: Those whose scores are contributions, measured or foreseen: what was measured of heads by the one
#: holds for the other.
CONTRIBUTIONS = (Contribution.name, PredictedContribution.name)

#: Tokens; see `Selection`. Of a sentence alone each head would keep a pair or two, and the model
#: goes astray in the middle of what it copies. A corpus of paragraphs gets 1.5 % larger by it.
DEFAULT_FLOOR = 40


def selection_named(name: str) -> type[Selection]:
    """The selection of that name, or `InvalidInputError` with the names there are."""
    if name not in SELECTIONS:
        raise InvalidInputError(
            f"no selection is called {name!r}; there are: {', '.join(SELECTIONS)}"
        )
    return SELECTIONS[name]


__all__ = [
    "CONTRIBUTIONS",
    "DEFAULT_FLOOR",
    "DEFAULT_SELECTION",
    "SELECTIONS",
    "SPREADS",
    "Contribution",
    "ExpectedAttention",
    "KeyDiversity",
    "LayerView",
    "PaperRule",
    "PredictedContribution",
    "Questions",
    "Reconstruction",
    "Selection",
    "Spread",
    "selection_named",
]
