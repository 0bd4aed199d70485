"""How well memories stand for text: nothing, RAG and memory on the questions of a file.

    from model_adapter.evaluation import Settings, evaluate

    found = evaluate(Path("corpus.jsonl"), Path("questions.jsonl"), Settings(limit=60))
    print(found.best.share, found.best.share_interval)

Figures are means over questions of the mean per answer token, with paired bootstrap intervals; see
docs/evaluation.md.
"""

from model_adapter.attention.weighing import EVEN, Weighing
from model_adapter.evaluation.answers import exact_match, f1, holds, normalized
from model_adapter.evaluation.arms import answer_of, prompt_of
from model_adapter.evaluation.bootstrap import Bootstrap, Interval
from model_adapter.evaluation.figures import ArmFigures, Compared, Figure
from model_adapter.evaluation.memories_seen import Size
from model_adapter.evaluation.picture import plot, require_picture
from model_adapter.evaluation.questions import Question, read_documents, read_questions, spread
from model_adapter.evaluation.report import ARMS, Evaluation, FramingFigures
from model_adapter.evaluation.run import evaluate
from model_adapter.evaluation.running_text import RunningText
from model_adapter.evaluation.scoring import Outcome
from model_adapter.evaluation.settings import References, Settings

__all__ = [
    "ARMS",
    "EVEN",
    "ArmFigures",
    "Bootstrap",
    "Compared",
    "Evaluation",
    "Figure",
    "FramingFigures",
    "Interval",
    "Outcome",
    "Question",
    "References",
    "RunningText",
    "Settings",
    "Size",
    "Weighing",
    "answer_of",
    "evaluate",
    "exact_match",
    "f1",
    "holds",
    "normalized",
    "plot",
    "prompt_of",
    "read_documents",
    "read_questions",
    "require_picture",
    "spread",
]
