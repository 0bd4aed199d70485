"""What is learned from: corpora, cut into references as they would be at ingest."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from memdb import Chunker, InvalidInputError, Progress, no_progress, read_corpus
from model_adapter.evaluation.questions import read_questions
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.overlap import overlaps

_LEAST = 16  # tokens of a reference that is worth asking about
_EXCLUDED = 2 / 3  # overlap with what must not be learned (paper, evaluation)
_GRAM = 4  # tokens in a row that a reference and a text have in common, or do not overlap


@dataclass(frozen=True)
class Question:
    """About a document, by somebody who read it."""

    text: str
    answer: str


@dataclass(frozen=True)
class Reference:
    """A piece of a document.

    Attributes:
        document: its document's number.
        ordinal: its place in the document.
        text: without the white space around it.
        tokens: its token ids.
        part: whether it is only a part of that piece.
    """

    document: int
    ordinal: int
    text: str
    tokens: tuple[int, ...]
    part: bool = False


@dataclass(frozen=True)
class Corpus:
    """References, by document.

    Attributes:
        names: of the documents.
        documents: the references of each, in order; those that must not be learned left out.
        questions: about documents, by number.
        excluded: how many references were left out.
    """

    names: tuple[str, ...]
    documents: tuple[tuple[Reference, ...], ...]
    questions: Mapping[int, Sequence[Question]]
    excluded: int = 0

    @property
    def references(self) -> list[Reference]:
        """All of them."""
        return [reference for document in self.documents for reference in document]

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over the references' texts."""
        texts = [[reference.text for reference in document] for document in self.documents]
        return str(xxhash.xxh3_128_hexdigest(json.dumps(texts).encode()))

    def split(self, passages: int, seed: int) -> tuple[Corpus, Corpus]:
        """Two corpora: to train with, and to measure by; of whole documents.

        Args:
            passages: references to measure by, each of a document of its own.
            seed: of which documents these are.

        Raises:
            InvalidInputError: that would be more than a third of all documents.
        """
        usable = [i for i, references in enumerate(self.documents) if _worth(references)]
        if passages and passages > len(usable) // 3:
            raise InvalidInputError(
                f"{passages} passages cannot be held out of {len(usable)} documents, at most a "
                f"third of them can: {len(usable) // 3}"
            )
        out = set(random.Random(f"held out {seed}").sample(usable, passages))
        return self._only(set(usable) - out), self._only(out)

    def _only(self, numbers: set[int]) -> Corpus:
        kept = tuple(refs if i in numbers else () for i, refs in enumerate(self.documents))
        questions = {i: asked for i, asked in self.questions.items() if i in numbers}
        return Corpus(self.names, kept, questions)


def _worth(references: Sequence[Reference]) -> bool:
    return any(map(worth_asking, references))


def worth_asking(reference: Reference) -> bool:
    """Whether it says enough to be asked about."""
    return len(reference.tokens) >= _LEAST


def read(
    model: LanguageModel,
    corpora: Sequence[Path],
    *,
    questions: Path | None = None,
    exclude: Sequence[Path] = (),
    length: int = 128,
    progress: Progress = no_progress,
) -> Corpus:
    """Corpora as one, cut by a model's tokens.

    Args:
        model: whose.
        corpora: files as `memdb ingest` takes them.
        questions: a file of lines of `question`, `answers` and `document`.
        exclude: corpora that must not be learned: references that overlap a document of theirs by
            2/3 are left out.
        length: most tokens of a reference.
        progress: told of it.

    Raises:
        CorpusError: a line is wrong, naming it.
        InvalidInputError: a file cannot be read, or nothing is left to learn from.
    """
    chunker = Chunker(model.tokenizer_json, length)
    banned = _Banned(model, exclude)
    texts = {(path, key): doc.text for path in corpora for _, key, doc in read_corpus(path)}
    names: list[str] = []
    documents: list[tuple[Reference, ...]] = []
    excluded = 0
    for number, ((_, key), text) in enumerate(texts.items()):
        progress("cutting documents", number, len(texts))
        pieces = [piece.text.strip() for piece in chunker.split(text)]
        made = [
            Reference(number, ordinal, piece, tuple(model.tokens(piece)))
            for ordinal, piece in enumerate(pieces)
            if piece
        ]
        kept = tuple(r for r in made if 1 <= len(r.tokens) <= length and not banned.has(r.tokens))
        excluded += len(made) - len(kept)
        names.append(key)
        documents.append(kept)
    progress("cutting documents", len(texts), len(texts))
    asked = {} if questions is None else _questions(questions, names)
    corpus = Corpus(tuple(names), tuple(documents), asked, excluded)
    if not any(map(_worth, documents)):
        raise InvalidInputError(
            f"there is nothing to learn from in {', '.join(repr(str(path)) for path in corpora)}: "
            f"no reference of at least {_LEAST} tokens"
            + (" that --exclude leaves" if exclude else "")
        )
    return corpus


def _questions(path: Path, names: Sequence[str]) -> dict[int, list[Question]]:
    """Questions of a file, by the number of the document that they are about. Those that need
    several documents are passed over: a passage is of one."""
    numbers = {name: number for number, name in enumerate(names)}
    found: dict[int, list[Question]] = defaultdict(list)
    for asked in read_questions(path, numbers):
        if len(asked.documents) > 1:
            continue
        question = Question(asked.text.strip(), asked.answers[0].strip())
        found[numbers[asked.document]].append(question)
    return dict(found)


class _Banned:
    """Texts that must not be learned."""

    def __init__(self, model: LanguageModel, corpora: Sequence[Path]) -> None:
        self._texts: list[list[int]] = []
        self._grams: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for path in corpora:
            for _, _, document in read_corpus(path):
                tokens = model.tokens(document.text)
                for at in range(len(tokens) - _GRAM + 1):
                    self._grams[tuple(tokens[at : at + _GRAM])].add(len(self._texts))
                self._texts.append(tokens)

    def has(self, tokens: Sequence[int]) -> bool:
        """Whether a reference overlaps one of them. What has no four tokens in a row in common is
        not looked at any closer."""
        shared: set[int] = set()
        for at in range(len(tokens) - _GRAM + 1):
            shared |= self._grams.get(tuple(tokens[at : at + _GRAM]), set())
        return any(overlaps(self._texts[i], tokens, _EXCLUDED) for i in shared)
