"""Training of adapters by which a model writes better memories (paper, 3.6).

corpus = read(model, [Path("corpus.jsonl")])
train(model, corpus, Recipe(steps=2000), Path("out"))     # the adapter is in out/adapter
"""

from model_adapter.training.corpus import Corpus, Question, Reference, read
from model_adapter.training.picture import draw_log, require_drawing
from model_adapter.training.recipe import Recipe
from model_adapter.training.trainer import Trained, train

__all__ = [
    "Corpus",
    "Question",
    "Recipe",
    "Reference",
    "Trained",
    "draw_log",
    "read",
    "require_drawing",
    "train",
]
