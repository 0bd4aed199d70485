"""A conversation over a database, which can remember and forget while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from memdb import DocumentExistsError, InvalidInputError, MemDB, StoredDocument
from model_adapter.generation import Run, Stream, new_reader
from model_adapter.options import options_of
from model_adapter.writer import Writer

#: Metadata of what a conversation remembers.
SOURCE = {"source": "chat"}


class Chat:
    """Messages by turns, with memories for each. What was read of the conversation is kept, so that
    a turn costs its own tokens only.

        chat = Chat(db)
        for piece in chat.say("Who keeps the lighthouse?"):
            print(piece, end="", flush=True)

    Args:
        db: opened with its model, in the chat framing.
        window: most tokens of the conversation that are kept in the prompt; the oldest turns leave.
        remember_turns: whether turns that leave are written into the database as memories, so that
            a long conversation keeps its knowledge at a constant length of the prompt.
        system: what stands before everything, in the words of the system.
        options: see `Options`; `mode` may be `memory` or `none`.

    Attributes:
        messages: of the user and the assistant, the oldest first, as far as they are in the window.
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
        self.messages: list[dict[str, str]] = []
        self.remembered: list[str] = []
        self._db = db
        self._window = window
        self._remember_turns = remember_turns
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._options = options_of(options)
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
        self._reader = new_reader(db, self._options)
        self._run: Run | None = None

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
        self._run = Run(
            [[*self._system, *self.messages, asked]], self._db, self._options, self._reader
        )
        self.messages.append(asked)
        return Stream(self._run)

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
        """Put the last answer, as far as it came, into the conversation."""
        if self._run is None:
            return
        run, self._run = self._run, None
        answers = run.results()
        if answers and answers[0].text:
            self.messages.append({"role": "assistant", "content": answers[0].text})
        else:
            self.messages.pop()

    def _make_room(self, asked: dict[str, str]) -> None:
        """Let the oldest turns leave until the rest fits, with some room for the next ones: each
        time that one leaves, all must be read again."""
        length = self._length([*self.messages, asked])
        if length <= self._window:
            return
        leaving = 0
        while length > self._window * 3 // 4 and leaving < len(self.messages):
            leaving += 2
            length = self._length([*self.messages[leaving:], asked])
        if length > self._window:
            raise InvalidInputError(
                f"the message has {length} tokens, more than the window of {self._window}; shorten "
                "it, or take a larger window"
            )
        if self._remember_turns:
            for question, answer in _turns(self.messages[:leaving]):
                with suppress(DocumentExistsError):  # said before
                    self.remember(f"User: {question}\nAssistant: {answer}")
        del self.messages[:leaving]

    def _length(self, messages: list[dict[str, str]]) -> int:
        writer = self._db.writer
        assert isinstance(writer, Writer)
        prompt = writer.frame.behind_memories([*self._system, *messages])
        return len(prompt.content) + len(prompt.tail)


def _turns(messages: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    contents = [message["content"] for message in messages]
    return zip(contents[::2], contents[1::2], strict=True)
