"""A corpus and questions on it: read and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memdb import Document, InvalidInputError, json_object, read_corpus

_LINE = '{"question": "...", "answers": ["..."], "document": "..."}'


@dataclass(frozen=True)
class Question:
    """A question that a document answers, or several together.

    Attributes:
        id: its name; default: the line it stands in.
        text: the question.
        answers: accepted answers, at least one; the likelihood is that of the first.
        documents: ids of the documents that answer it, at least one.
        distractors: ids of documents that are close to it and do not answer it.
        kind: what sort of question it is; None: nobody says.
        wrong: answers that are not accepted, among which the right one is ranked; none: answers to
            other questions.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    kind: str | None = None
    wrong: tuple[str, ...] = ()

    @property
    def document(self) -> str:
        """The first of its documents."""
        return self.documents[0]


def read_documents(path: Path) -> dict[str, Document]:
    """The documents of a corpus by id, in the order of the file.

    Args:
        path: JSON lines of `id` (optional), `text`, `metadata` (optional).

    Raises:
        InvalidInputError: there is no such file, it holds no documents, or a line is wrong (naming
            file and line).
    """
    _require_file(path)
    documents = {key: document for _, key, document in read_corpus(path)}
    if not documents:
        raise InvalidInputError(
            f'\'{path}\' holds no documents; a line looks like {{"id": "a", "text": "..."}}'
        )
    return documents


def read_questions(path: Path, documents: Container[str]) -> list[Question]:
    """The questions of a file, in its order; blank lines are passed over.

    Args:
        path: JSON lines of `question`, `answers`, `document` or `documents`, and `id`,
            `distractors`, `kind`, `wrong` (optional); other fields are passed over.
        documents: ids of those that questions may name.

    Raises:
        InvalidInputError: naming file and line: no JSON, a field that is missing or wrong, a
            document that the corpus does not have, or the same question twice.
    """
    _require_file(path)
    questions: list[Question] = []
    seen: dict[tuple[str, ...], int] = {}
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InvalidInputError(f"cannot read '{path}': {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(line, number, documents)
            same = ("question", question.text, *question.documents)
            on = "document" if len(question.documents) == 1 else "documents"
            for key, what in (
                (("id", question.id), f"the id '{question.id}' is already used"),
                (same, f"the same question on the same {on} is already"),
            ):
                if key in seen:
                    raise InvalidInputError(f"{what} in line {seen[key]}; leave one of them out")
                seen[key] = number
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}, line {number}: {error}") from error
        questions.append(question)
    if not questions:
        raise InvalidInputError(f"'{path}' holds no questions; a line looks like {_LINE}")
    return questions


def spread(number: int, limit: int | None) -> list[int]:
    """At most `limit` of the places 0 to number - 1, evenly spread, both ends among them."""
    if limit is None or limit >= number:
        return list(range(number))
    places: list[int] = np.linspace(0, number - 1, limit).astype(int).tolist()
    return places


def _question(line: bytes, number: int, documents: Container[str]) -> Question:
    fields = json_object(line, _LINE)
    for name in ("question", "answers"):
        _require_field(name, fields)
    answers = fields["answers"]
    if not isinstance(answers, list) or not answers:
        raise InvalidInputError(
            f"'answers' must be a list of at least one accepted answer, got {answers!r:.60}; leave "
            "out a question that nothing answers"
        )
    for answer in answers:
        _require_text("an answer", answer)
    _require_text("'question'", fields["question"])
    answering = _answering(fields, documents)
    distractors = _ids("distractors", fields.get("distractors") or [], documents)
    if both := set(answering) & set(distractors):
        raise InvalidInputError(
            f"the document {min(both)!r:.100} stands among the 'distractors', too: these are "
            "documents that do not answer the question"
        )
    kind = fields.get("kind")
    if kind is not None:
        _require_text("'kind'", kind)
    own = fields.get("id")
    if own is None:
        own = f"line {number}"
    elif isinstance(own, bool) or not isinstance(own, (str, int)):
        raise InvalidInputError(f"'id' must be a text, got {own!r:.60}")
    wrong = _wrong(fields.get("wrong") or [], answers)
    text = fields["question"]
    return Question(str(own), text, tuple(answers), answering, distractors, kind, wrong)


def _wrong(value: Any, answers: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InvalidInputError(f"'wrong' must be a list of answers, got {value!r:.60}")
    for answer in value:
        _require_text("an answer of 'wrong'", answer)
        if answer in answers:
            raise InvalidInputError(f"the answer {answer!r:.60} of 'wrong' is an accepted one, too")
    return tuple(value)


def _answering(fields: Mapping[str, Any], documents: Container[str]) -> tuple[str, ...]:
    """Ids of the documents that answer."""
    if "documents" not in fields:
        _require_field("document", fields)
        document = fields["document"]
        if not isinstance(document, str) or document not in documents:
            raise InvalidInputError(
                f"the corpus has no document {document!r:.100}; 'document' is the id of the one "
                "that answers the question"
            )
        return (document,)
    if "document" in fields:
        raise InvalidInputError(
            "'document' and 'documents' are both there; give the first for one document that "
            "answers, the second for several"
        )
    found = _ids("documents", fields["documents"], documents)
    if not found:
        raise InvalidInputError(
            "'documents' is empty; it lists the ids of those that answer the question, at least one"
        )
    return found


def _ids(name: str, value: Any, documents: Container[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InvalidInputError(f"'{name}' must be a list of documents' ids, got {value!r:.60}")
    for document in value:
        if not isinstance(document, str) or document not in documents:
            raise InvalidInputError(f"the corpus has no document {document!r:.100} of '{name}'")
        if value.count(document) > 1:
            raise InvalidInputError(f"the document {document!r:.100} stands twice in '{name}'")
    return tuple(value)


def _require_field(name: str, fields: Mapping[str, Any]) -> None:
    if name not in fields:
        raise InvalidInputError(f"the field '{name}' is missing; a line looks like {_LINE}")


def _require_text(what: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(f"{what} must be a text that says something, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{what} holds half a surrogate pair: {value!r:.60}") from error


def _require_file(path: Path) -> None:
    try:
        exists, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path
        raise InvalidInputError(f"cannot read '{path}': {error}") from error
    if not exists:
        raise InvalidInputError(f"there is no file '{path}'")
    if not regular:  # it is read more than once
        raise InvalidInputError(f"'{path}' is no regular file; copy it into one")
