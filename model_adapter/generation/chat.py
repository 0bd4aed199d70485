"""A conversation over a database, which can remember and forget while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from memdb import DocumentExistsError, InvalidInputError, MemDB, StoredDocument
from model_adapter.generation.generate import Run, Stream, new_reader, new_sampler, one_answer
from model_adapter.generation.options import options_of
from model_adapter.writing.writer import Writer

#: Metadata of what a conversation remembers.
SOURCE = {"source": "chat"}


class Chat:
    """Messages by turns, with memories for each. What was read of the conversation is kept, so that
    a turn costs its own tokens only, and only the new turn is looked up (as in `generate`).

        chat = Chat(db)
        for piece in chat.say("Who keeps the lighthouse?"):
            print(piece, end="", flush=True)

    Args:
        db: opened with its model, in the chat framing.
        window: most tokens of the conversation that are kept in the prompt; the oldest turns leave.
            No more than the model has room for.
        remember_turns: whether turns that leave are written into the database as memories, so that
            a long conversation keeps its knowledge at a constant length of the prompt.
        system: a message of the system, before everything that is said.
        options: see `Options`; `mode` may be `memory` or `none`.

    Attributes:
        remembered: ids of the documents that were written by this conversation.

    Raises:
        InvalidInputError: an option is wrong, or the database's framing is `plain`.
    """

    def __init__(
        self,
        db: MemDB,
        *,
        window: int = 1024,
        remember_turns: bool = False,
        system: str | None = None,
        **options: Any,
    ) -> None:
        self.remembered: list[str] = []
        self._db = db
        self._remember_turns = remember_turns
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._options = one_answer(options_of(options))
        if self._options.mode == "rag":
            raise InvalidInputError(
                "a chat goes on from what it has read, and text before it would change with every "
                "turn: mode is 'memory' or 'none'"
            )
        if db.shape.framing != "chat":
            raise InvalidInputError(
                f"the database '{db.path}' has the framing 'plain': it knows no turns. `memdb init "
                "--framing chat` makes one for a model with a chat template"
            )
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InvalidInputError(f"window must be a whole number of at least 1, got {window!r}")
        new_sampler(self._options)  # wrong ones are refused now, not with the first message
        self._reader = new_reader(db, self._options)
        self._largest = self._room()
        self._window = min(window, self._largest)
        self._settled: list[dict[str, str]] = []  # turns that are over
        self._run: Run | None = None  # the turn that is not, if any
        self._asked: dict[str, str] = {}

    @property
    def messages(self) -> list[dict[str, str]]:
        """What user and assistant said, the oldest first, as far as it is in the window; of an
        answer that is still coming, what came. What the model thought is not in it."""
        if self._run is None:
            return [*self._settled]
        answer = self._run.said()
        said = [{"role": "assistant", "content": answer}] if answer else []
        return [*self._settled, self._asked, *said]

    def say(self, text: str) -> Stream:
        """What the user says; the answer to it, piece by piece. One that is given up stands in the
        conversation as far as it came.

        Raises:
            InvalidInputError: the text is empty, or too long for the window.
        """
        self._settle()
        if not text.strip():
            raise InvalidInputError("the message is empty")
        asked = {"role": "user", "content": text}
        self._make_room(asked)
        run = Run([[*self._system, *self._settled, asked]], self._db, self._options, self._reader)
        self._run, self._asked = run, asked
        return Stream(run)

    def remember(self, text: str) -> StoredDocument:
        """Write a text into the database; the next answer may use it.

        Raises:
            DocumentExistsError: it is there already.
            InvalidInputError: the text is empty.
        """
        document = self._db.insert(text, metadata=SOURCE)
        self.remembered.append(document.id)
        return document

    def forget(self, id: str) -> None:
        """Delete a document, whoever wrote it; `UnknownDocumentError` if there is none."""
        self._db.delete(id)
        if id in self.remembered:
            self.remembered.remove(id)

    def close(self) -> None:
        """Give up what is being computed."""
        self._reader.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle(self) -> None:
        """Put the last answer, as far as it came, into the conversation; without an answer, there
        was no question."""
        if self._run is None:
            return
        self._run.close()  # its reader is the next one's
        messages = self.messages
        if messages[-1] is self._asked:
            messages.pop()
        self._settled, self._run = messages, None

    def _room(self) -> int:
        """Tokens of a conversation that fit into the model with an answer."""
        model, shape = self._writer.model, self._db.shape
        answer = self._options.max_new_tokens
        room = model.max_positions - len(shape.prefix) - shape.reference_length - answer
        if room < 1:
            raise InvalidInputError(
                f"max_new_tokens is {answer}: that leaves no room for a question before the end of "
                f"the model '{model.name}' at {model.max_positions}"
            )
        return room

    def _make_room(self, asked: dict[str, str]) -> None:
        """Let the oldest turns leave until the rest fits, with some room for the next ones: each
        time that one leaves, all must be read again."""
        messages = self._settled
        length = self._length([*messages, asked])
        if length <= self._window:
            return
        leaving = 0
        while length > self._window * 3 // 4 and leaving < len(messages):
            leaving += 2
            length = self._length([*messages[leaving:], asked])
        if length > self._window:
            raise InvalidInputError(
                f"the message has {length} tokens, more than the window of {self._window}; shorten "
                f"it, or take a larger window (the model has room for {self._largest})"
            )
        if self._remember_turns:
            for question, answer in _turns(messages[:leaving]):
                with suppress(DocumentExistsError):  # said before
                    self.remember(f"User: {question}\nAssistant: {answer}")
        self._settled = messages[leaving:]

    @property
    def _writer(self) -> Writer:
        writer = self._db.writer
        assert isinstance(writer, Writer)
        return writer

    def _length(self, messages: list[dict[str, str]]) -> int:
        prompt = self._reader.frame.behind_memories([*self._system, *messages])
        return len(prompt.content) + len(prompt.tail)


def _turns(messages: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    contents = [message["content"] for message in messages]
    return zip(contents[::2], contents[1::2], strict=True)
