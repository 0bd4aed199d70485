"""Generation with explicit memory (paper, 3.1): 5 memories for every 64 tokens."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, overload

from memdb import InvalidInputError, MemDB
from model_adapter.generation.answer import Finish, Generation
from model_adapter.generation.chunks import Reading
from model_adapter.generation.detokenizing import Detokenizer, without_thoughts
from model_adapter.generation.options import Options, options_of
from model_adapter.generation.reader import Reader
from model_adapter.generation.sampling import Sampler
from model_adapter.prompts.framing import Message
from model_adapter.writing.writer import Writer

#: A text, or the messages of a conversation.
Prompt = str | Sequence[Message]


@overload
def generate(prompt: str, db: MemDB, *, n: int, **options: Any) -> list[Generation]: ...
@overload
def generate(
    prompt: Sequence[Message], db: MemDB, *, n: int, **options: Any
) -> list[Generation]: ...
@overload
def generate(
    prompt: Sequence[Prompt], db: MemDB, *, n: int, **options: Any
) -> list[list[Generation]]: ...
@overload
def generate(prompt: str, db: MemDB, **options: Any) -> Generation: ...
@overload
def generate(prompt: Sequence[Message], db: MemDB, **options: Any) -> Generation: ...
@overload
def generate(prompt: Sequence[Prompt], db: MemDB, **options: Any) -> list[Generation]: ...


def generate(
    prompt: Prompt | Sequence[Prompt], db: MemDB, **options: Any
) -> Generation | list[Generation] | list[list[Generation]]:
    """Answer a prompt, or several side by side, with the explicit memories of a database.

    Each turn of a conversation is cut into chunks of 64 tokens; a prompt that is a text, and what
    the system says, are turns, too. Each chunk retrieves 5 memories for itself, and sees no others.
    It is looked up by the last 64 tokens of its turn's words up to its end: never by another
    turn's, nor by the template's. Only a message of the user of less than 10 tokens ("And when?")
    is looked up twice, by itself and by itself with what was said before (64 tokens together), and
    the 5 best of both stay. While generating, after every 64 tokens the memories are dropped and
    new ones retrieved with those tokens as the query. A chunk that says nothing in words (blanks)
    keeps the memories in use; one that finds none (see `Options.min_score`) has none. All chunks of
    all prompts are read in one pass.

    Of references with the same text one is taken. Memories count by their retrieval scores: those
    behind the best of their chunk get less attention, and those far behind are left out (see
    `Options.weigh`, and `model_adapter.attention.weighing` for the constants).

    With `mode="rag"` the same is looked up for the last turn, and the 5 best references of all its
    chunks stand as text before the prompt.

    Args:
        prompt: plain text, or messages (`{"role": ..., "content": ...}`) of a conversation in the
            chat framing, which is put around either; or a list of such prompts. What one prompt
            gets for an answer does not depend on the others, but for rounding; what is drawn for it
            depends on its number.
        db: opened with its model (`open_database`); the model that wrote the memories generates.
        options: see `Options`.

    Returns:
        An answer; for a list of prompts, one for each. With `n=`, a list of so many answers in the
        place of each.

    Raises:
        InvalidInputError: naming the option, or that a prompt is too long for the model.
        MissingPartError: the database was opened without its model.
    """
    prompts, several = _prompts(prompt)
    how = options_of(options)
    run = Run(prompts, db, how)
    for _ in run:
        pass
    results = run.results()
    if how.n is None:
        return results if several else results[0]
    of_prompts = [results[at : at + how.n] for at in range(0, len(results), how.n)]
    return of_prompts if several else of_prompts[0]


class Stream:
    """An answer while it comes: iterate over its pieces of text. See `stream`."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __iter__(self) -> Iterator[str]:
        for _, piece in self._run:
            yield piece

    @property
    def result(self) -> Generation:
        """The whole answer; what has not come yet is waited for, unless it was given up."""
        for _ in self._run:
            pass
        return self._run.results()[0]

    def close(self) -> None:
        """Give up what has not come yet."""
        self._run.close()


def stream(prompt: Prompt, db: MemDB, **options: Any) -> Stream:
    """`generate` for one prompt, piece by piece:

        answer = stream("Who keeps the lighthouse?", db)
        for piece in answer:
            print(piece, end="", flush=True)
        print(answer.result.seconds)

    Args and errors: as `generate`. Nothing is computed before the first piece is asked for.
    """
    prompts, several = _prompts(prompt)
    if several:
        raise InvalidInputError("only one prompt can be streamed; `generate` takes several")
    return Stream(Run(prompts, db, one_answer(options_of(options))))


def one_answer(options: Options) -> Options:
    """The options, if they ask for one answer."""
    if options.answers > 1:
        raise InvalidInputError(
            f"n is {options.n}, and one answer comes piece by piece; `generate` gives several"
        )
    return options


def _prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Prompts, and whether a list of them was given."""
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, Sequence):
        raise InvalidInputError(
            f"a prompt is a text, a list of messages, or a list of such prompts, not {prompt!r:.60}"
        )
    prompts: list[Any] = list(prompt)
    if prompts and all(isinstance(part, dict) for part in prompts):
        return [prompts], False
    if not prompts or any(not isinstance(part, (str, list, tuple)) for part in prompts):
        raise InvalidInputError(
            "a prompt is a text, a list of messages, or a list of such prompts; this one is "
            + ("empty" if not prompts else f"{prompts!r:.60}")
        )
    return prompts, True


def new_reader(db: MemDB, options: Options) -> Reader:
    """A reader for a database that was opened with its model."""
    writer = db.writer
    if not isinstance(writer, Writer):
        raise InvalidInputError(
            f"generate needs a database whose writer is a model_adapter.Writer, not a "
            f"{type(writer).__name__}"
        )
    if options.mode != "none":
        db.embedder  # noqa: B018 - loaded here, so that the timings are those of the work
    return Reader(db, writer, options)


def new_sampler(options: Options, batch: int = 1) -> Sampler:
    """What chooses tokens of so many sequences; `InvalidInputError` for an option that it
    refuses."""
    return Sampler(
        batch,
        answers=options.answers,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


class Run:
    """One generation: iterate over (number of the answer, piece of it). Answers to one prompt
    follow each other.

    Args:
        prompts: read side by side.
        db: where memories are.
        options: see `Options`.
        reader: that goes on reading; default: one of its own.
    """

    def __init__(
        self, prompts: list[Prompt], db: MemDB, options: Options, reader: Reader | None = None
    ) -> None:
        self._prompts = prompts
        self._options = options
        self._db = db
        self._reader = reader
        answers = len(prompts) * options.answers
        self._sampler = new_sampler(options, answers)
        self._finished: list[Finish | None] = [None] * answers
        self._readings = [Reading() for _ in range(answers)]
        self._texts: list[Detokenizer] = []
        self._seconds: dict[str, float] = {}
        self._first_token = 0.0
        self._pieces = self._generated()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._pieces

    def close(self) -> None:
        """Give the answers up: no more of them comes."""
        self._pieces.close()

    def results(self) -> list[Generation]:
        """The answers, as far as they came."""
        seconds = {**self._seconds, "first_token": self._first_token}
        texts = [text.text for text in self._texts] or [""] * len(self._readings)
        return [
            Generation(
                text,
                reading.tokens,
                finished or "length",
                self._options.mode,
                reading.chunks,
                reading.prompt_tokens,
                seconds,
            )
            for text, reading, finished in zip(texts, self._readings, self._finished, strict=True)
        ]

    def said(self) -> str:
        """The first answer, as far as it came, without what was thought before it."""
        if self._options.hide_thinking or not self._texts:
            return self.results()[0].text
        return without_thoughts(self._texts[0].text, self._readings[0].thinks)

    def _generated(self) -> Generator[tuple[int, str], None, None]:
        own = self._reader is None
        reader = self._reader or new_reader(self._db, self._options)
        try:
            yield from self._decoded(reader)
        finally:
            if own:
                reader.close()

    def _decoded(self, reader: Reader) -> Iterator[tuple[int, str]]:
        began = time.perf_counter()
        logits = reader.read(self._prompts)
        if self._options.answers > 1:
            reader.branch(self._options.answers)
            logits = logits.repeat_interleave(self._options.answers, 0)
        # A reader that goes on reading for somebody else has others then.
        readings = self._readings = reader.readings
        self._seconds = reader.seconds
        stops = reader.stop_tokens
        texts = self._texts = [reader.detokenizer(reading) for reading in readings]
        rows = list(range(len(readings)))
        for number in range(self._options.max_new_tokens):
            before = [readings[row].all_tokens for row in rows]
            chosen = self._sampler.choose(logits, before, rows)
            if number == 0:
                self._first_token = time.perf_counter() - began
            for row, token in zip(rows, chosen, strict=True):
                reading, text = readings[row], texts[row]
                reading.tokens.append(token)
                piece = ""
                if token in stops:  # no word of the answer, whatever the tokenizer thinks of it
                    self._finished[row] = "end"
                else:
                    piece = text.add(token)
                    if text.stopped:
                        self._finished[row] = "stop"
                reading.finished = self._finished[row] is not None or (
                    number + 1 == self._options.max_new_tokens
                )
                if reading.finished:
                    piece += text.end()
                if piece:
                    yield row, piece
            going = [row for row in rows if not readings[row].finished]
            if not going:
                return
            logits = reader.step([readings[row].tokens[-1] for row in going])
            rows = going
