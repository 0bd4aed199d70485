"""Which references are found when documents are cut in one way or another, with places and without.

    python benchmarks/cutting.py --data DIR            # folders of corpus.jsonl, questions.jsonl
    python benchmarks/cutting.py                       # Python's documentation alone

Four arms: cut at sentences or by structure, embedded with their place or without. Of each, over all
questions: *document*, the share of the documents that a question is about of which a reference is
among the 5 nearest; *answer*, whether the text of these 5 holds an accepted answer (of Python's
documentation: of the section that the question is of). Intervals are of 95 %, paired.

Python's documentation is a page for each module, with a heading for each class, function and
method. A question is the first sentence of a docstring that has several: the corpus does not hold
it. `python` asks with it alone, `python+module` behind the module's name, as people do.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memdb import Chunker, Cutting, Document, Embedder, read_corpus
from model_adapter import LanguageModel, load_embedder
from model_adapter.evaluation import read_questions
from model_adapter.evaluation.bootstrap import Bootstrap, Means

SEEN = 5
ARMS = {
    f"{rule}{', place' if place else ''}": Cutting(rule, place)
    for rule in ("sentences", "structure")
    for place in (False, True)
}
MODULES = (
    "argparse array ast asyncio base64 bisect calendar cmd codecs collections concurrent.futures "
    "configparser contextlib copy csv ctypes datetime decimal difflib email.message enum fileinput "
    "fractions ftplib functools gettext glob gzip hashlib heapq html http.client imaplib inspect "
    "io ipaddress itertools json logging lzma mailbox math mimetypes multiprocessing operator os "
    "pathlib pdb pickle platform plistlib pprint queue random re sched select shelve shlex shutil "
    "smtplib socket sqlite3 ssl statistics string struct subprocess tarfile tempfile textwrap "
    "threading time timeit tokenize traceback types unittest urllib.parse urllib.request uuid "
    "warnings wave weakref xml.dom.minidom zipfile zlib"
)
_FIRST = re.compile(r"(.{20,200}?[.!?])\s+(\S.{40,})", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        text: of it.
        documents: that it is about.
        answers: of which one has to be read; or
        section: the characters of the only document of which one has to be read.
    """

    text: str
    documents: tuple[str, ...]
    answers: tuple[str, ...] = ()
    section: tuple[int, int] | None = None


def python_documentation(name_module: bool) -> tuple[list[Document], list[Asked]]:
    """A page for each module, and what is asked of it."""
    pages, questions = [], []
    for name in MODULES.split():
        module = importlib.import_module(name)
        page = f"# {name}\n\n{inspect.getdoc(module) or ''}\n"
        for level, title, doc in _members(module):
            found = _FIRST.match(doc)
            page += f"\n{'#' * level} {title}\n\n"
            if found is not None:
                start = len(page)
                asked = f"{name}: {found[1]}" if name_module else found[1]
                section = start, start + len(found[2].rstrip())
                questions.append(Asked(" ".join(asked.split()), (name,), section=section))
                doc = found[2]
            page += f"{doc.rstrip()}\n"
        pages.append(Document(page, name, {"title": f"Python's module {name}"}))
    return pages, questions


def _members(module: object) -> Iterator[tuple[int, str, str]]:
    """Levels, names and docstrings of what a module exports."""
    public = [name for name in vars(module) if not name.startswith("_")]
    for name in sorted(getattr(module, "__all__", public)):
        thing = getattr(module, name, None)
        doc = getattr(thing, "__doc__", None)
        if not callable(thing) or not isinstance(doc, str) or not doc.strip():
            continue
        yield 2, name, inspect.cleandoc(doc)
        for part, method in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
            inner = getattr(method, "__doc__", None)
            if not part.startswith("_") and callable(method) and isinstance(inner, str):
                yield 3, part, inspect.cleandoc(inner)


def recorded(folder: Path) -> tuple[list[Document], list[Asked]]:
    """A corpus with its questions."""
    documents = [document for _, _, document in read_corpus(folder / "corpus.jsonl")]
    names = {document.id or "" for document in documents}
    questions = [
        Asked(one.text, one.documents, one.answers)
        for one in read_questions(folder / "questions.jsonl", names)
    ]
    return documents, questions


class Vectors:
    """Those of texts, each made once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, NDArray[np.float32]] = {}

    def __call__(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """(texts, dimension) float32."""
        if query:
            return self._embedder.embed(texts, query=True)
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def found_by(
    chunker: Chunker, vectors_of: Vectors, documents: Sequence[Document], questions: Sequence[Asked]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    """Of each question whether its documents, and its answer, are found; the references' tokens."""
    owners, spans, texts, placed, tokens = [], [], [], [], []
    for document in documents:
        at = 0
        title = document.metadata.get("title", "")
        for piece in chunker.split(document.text, id=document.id, title=title):
            owners.append(document.id)
            spans.append((at, at + len(piece.text)))
            texts.append(piece.text)
            placed.append(piece.placed)
            tokens.append(piece.tokens)
            at += len(piece.text)
    vectors = vectors_of(placed)
    asked = vectors_of([one.text for one in questions], query=True)
    nearest = np.argsort(-(asked @ vectors.T), 1, kind="stable")[:, :SEEN]
    of_documents, of_answers = [], []
    for one, seen in zip(questions, nearest.tolist(), strict=True):
        there = {owners[n] for n in seen}
        of_documents.append(sum(name in there for name in one.documents) / len(one.documents))
        if one.section is None:
            read = "\n".join(texts[n] for n in seen).lower()
            of_answers.append(float(any(answer.lower() in read for answer in one.answers)))
        else:
            first, behind = one.section
            of_answers.append(
                float(
                    any(
                        owners[n] in one.documents and spans[n][0] < behind and spans[n][1] > first
                        for n in seen
                    )
                )
            )
    return np.array(of_documents), np.array(of_answers), tokens


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="a folder of folders with corpus and questions")
    parser.add_argument(
        "--tokenizer", default="smollm2-135m", help="model whose tokens are counted"
    )
    parser.add_argument("--embedder", default="all-minilm-l6-v2")
    parser.add_argument("--only", action="append", help="of these corpora alone")
    options = parser.parse_args()
    tokenizer = LanguageModel.load(options.tokenizer).tokenizer_json
    vectors_of = Vectors(load_embedder(options.embedder))
    sets = {
        "python": python_documentation(name_module=False),
        "python+module": python_documentation(name_module=True),
    }
    for folder in sorted(options.data.iterdir()) if options.data else ():
        if (folder / "questions.jsonl").exists():
            sets[folder.name] = recorded(folder)
    print("| corpus | questions | cut | references | tokens | document | answer | of the first |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (documents, questions) in sets.items():
        if options.only and name not in options.only:
            continue
        first = next(iter(ARMS))
        columns: dict[str, NDArray[np.float64]] = {}
        for arm, cutting in ARMS.items():
            of_documents, of_answers, tokens = found_by(
                Chunker(tokenizer, 128, cutting), vectors_of, documents, questions
            )
            columns[arm] = of_answers
            bootstrap = Bootstrap({one: columns[one] for one in {first, arm}}, 0)

            def more(means: Means, arm: str = arm, first: str = first) -> NDArray[np.float64]:
                return means[arm] - means[first]

            value, interval = bootstrap.figure(more)
            shown = (
                ""
                if arm == first or interval is None
                else (f"{value:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]")
            )
            print(
                f"| {name} | {len(questions)} | {arm} | {len(tokens)} | {np.mean(tokens):.0f} "
                f"| {of_documents.mean():.3f} | {of_answers.mean():.3f} | {shown} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
