"""The read path of one generation: retrieves memories, and reads tokens with them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from memdb import InvalidInputError, MemDB
from model_adapter.attention.context import Context, Stretch
from model_adapter.attention.uploading import uploaded
from model_adapter.attention.watch import Watch
from model_adapter.attention.weighing import asks
from model_adapter.generation.chunks import Chunk, Reading
from model_adapter.generation.detokenizing import Detokenizer
from model_adapter.generation.lookup import Lookup, Query, decoder_for, merged
from model_adapter.generation.options import Options
from model_adapter.prompts.framing import Frame, Message, Prompt
from model_adapter.prompts.turns import Cut, cuts_of
from model_adapter.writing.writer import Writer

_WORTH = 16  # steps that pay for being recorded, which takes as long as some


def records_steps(device: torch.device) -> bool:
    """Whether steps there are recorded."""
    return device.type == "cuda"


class Reader:
    """Reads prompts side by side, and then what is generated.

    Args:
        db: where memories are.
        writer: the one that wrote them.
        options: of the generation.

    Attributes:
        readings: of the prompts.
        seconds: `retrieve`, `read` and `decode`.
    """

    def __init__(self, db: MemDB, writer: Writer, options: Options) -> None:
        self.readings: list[Reading] = []
        self.seconds = {"retrieve": 0.0, "read": 0.0, "decode": 0.0}
        self._db = db
        self._options = options
        self._model = writer.model
        self._frame = writer.frame.told(options.template)
        self._context: Context | None = None
        self._held: list[int] = []  # tokens of a single prompt that the context has
        self._watch: Watch | None = None
        self._rows: list[int] = []  # whose readings the context's sequences are
        self._asked: list[int] = []  # whose memories are being looked for
        self._lookup = Lookup(db, writer.model, options, decoder_for(writer.model))
        self._said = 0  # tokens of the answer
        self._steps_are_new = True  # whether no step was taken since something else was read

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self._frame.stop_tokens

    @property
    def frame(self) -> Frame:
        """What puts prompts together."""
        return self._frame

    def detokenizer(self, reading: Reading) -> Detokenizer:
        """For the answer to what was read."""
        return Detokenizer(
            self._model.tokenizer,
            self._options.stops,
            hide_thinking=self._options.hide_thinking,
            thinks=reading.thinks,
        )

    def close(self) -> None:
        """Give up what is being retrieved."""
        self._lookup.close()

    # --- the prompt ---

    def read(self, prompts: Sequence[str | Sequence[Message]]) -> Tensor:
        """Read prompts; (prompts, vocabulary) logits of their last tokens. If this reader read a
        single prompt before and this one begins like it, only the rest is read."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.readings = [Reading() for _ in prompts]
        mode = self._options.mode
        if mode == "memory":
            framed = [self._frame.behind_memories(prompt) for prompt in prompts]
        elif mode == "none":
            framed = [self._frame.alone(prompt) for prompt in prompts]
        else:
            framed = self._with_text(prompts)
        whole = [[*prompt.content, *prompt.tail] for prompt in framed]
        for reading, prompt in zip(self.readings, framed, strict=True):
            reading.content, reading.thinks = prompt.content, prompt.thinks
        self._rows = list(range(len(prompts)))
        self._said, self._steps_are_new = 0, True
        known = self._known(whole)
        if known == 0:
            self._context = self._new_context(whole)
            self._held = []
        context = self._require_room(whole, known)
        if mode == "memory":
            sequences = self._with_memories(framed, known)
        else:
            sequences = [[Stretch(tokens[known:])] for tokens in whole]
        for reading, tokens in zip(self.readings, whole, strict=True):
            reading.prompt_tokens = len(tokens) - known
        self._look_at(sequences)
        with self._timed("read"), self._whole():
            logits = context.read(sequences, witness=self._watch)
            self._held = whole[0] if len(whole) == 1 else []
            self._note_attention()
        return torch.cat(logits)

    def _with_text(self, prompts: Sequence[str | Sequence[Message]]) -> list[Prompt]:
        """The prompts, each with what it retrieves as text before it: what is nearest to the chunks
        of its last turn, asked for as with memories, the best of all of them."""
        asked: list[list[Query]] = []
        for prompt in prompts:
            framed = self._frame.behind_memories(prompt)
            cuts = self._cuts(framed)
            last = [cut for cut in cuts if cut.turn == cuts[-1].turn]
            asked.append([self._query(framed, cut) for cut in last])
        with self._timed("retrieve"):
            found = iter(self._lookup.find_texts([query for of in asked for query in of]))
        texted = []
        for prompt, reading, queries in zip(prompts, self.readings, asked, strict=True):
            own = [one for one in islice(found, len(queries)) if one is not None]
            retrieval = merged(own, self._options.memories)
            reading.chunks.append(Chunk(0, False, retrieval))
            texts = [hit.reference.content for hit in retrieval.hits]
            texted.append(self._frame.with_text(texts, prompt))
        return texted

    def _with_memories(self, framed: Sequence[Prompt], known: int) -> list[list[Stretch]]:
        """The prompts cut into chunks (paper, 3.1), each with memories of its own: those that are
        nearest to its turn's words up to its end."""
        cuts = [self._cuts(prompt) for prompt in framed]
        asked = {
            (number, cut.start): self._query(framed[number], cut)
            for number, of_prompt in enumerate(cuts)
            for cut in of_prompt
            if self._is_new(cut, known) or cut is of_prompt[-1]
        }
        with self._timed("retrieve"):
            found = dict(zip(asked, self._lookup.find(list(asked.values())), strict=True))
        assert self._context is not None
        sequences = []
        for number, (prompt, reading) in enumerate(zip(framed, self.readings, strict=True)):
            in_use = self._context.memories[number]
            stretches = []
            for cut in cuts[number]:
                start = max(known, cut.start)
                new = found.get((number, cut.start))
                if new is not None:  # else the memories in use stay
                    reading.chunks.append(Chunk(start - known, False, new.retrieval))
                    in_use = new.memories
                tokens = prompt.content[start : cut.end]
                if cut is cuts[number][-1]:
                    # Of the tail, too, a part may be known: the same prompt again.
                    tokens += prompt.tail[max(0, known - cut.end) :]
                if tokens:
                    stretches.append(Stretch(tokens, in_use))
            sequences.append(stretches)
        return sequences

    def _cuts(self, prompt: Prompt) -> list[Cut]:
        return cuts_of(prompt.content, prompt.turns, self._options.retrieve_every)

    def _query(self, prompt: Prompt, cut: Cut) -> Query:
        text = self._model.tokenizer.decode(cut.words, skip_special_tokens=True)
        asked = cut.turn.role == "user" and asks(self._frame.framing, text)
        return Query(cut.words, prompt.content, cut.before, asked)

    @staticmethod
    def _is_new(cut: Cut, known: int) -> bool:
        """Whether a chunk needs memories of its own. The rest of an answer that was just given does
        not: it is read with what it was given with."""
        if cut.start < known and cut.turn.role == "assistant":
            return False
        return cut.end > known

    def _known(self, whole: list[list[int]]) -> int:
        """How many tokens of the only prompt the context has already; the rest of what it has is
        taken back. At least one is always read: its logits are wanted."""
        if self._context is None or len(whole) != 1:
            return 0
        held, tokens = self._held, whole[0]
        shared = next(
            (i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b),
            min(len(held), len(tokens)),
        )
        shared = min(shared, len(tokens) - 1)
        if not self._context.can_take_back(len(held) - shared):
            return 0  # it is read anew
        with self._whole():
            self._context.take_back(len(held) - shared)
            self._held = held[:shared]
        return shared

    def _new_context(self, whole: list[list[int]]) -> Context:
        capacity = max(map(len, whole)) + self._options.max_new_tokens
        batch = len(whole)
        self._watch = self._new_watch(batch)
        if self._options.mode != "memory":
            return Context(self._model, batch=batch, capacity=capacity)
        prefix, shape = self._frame.prefix, self._db.shape
        start = len(prefix) + shape.reference_length
        return Context(self._model, prefix, start, batch=batch, capacity=capacity)

    def _require_room(self, whole: list[list[int]], known: int) -> Context:
        """Refuse a prompt whose answer would run past the model's end, before it is read."""
        assert self._context is not None
        asked = self._options.max_new_tokens
        for number, (tokens, position) in enumerate(
            zip(whole, self._context.positions, strict=True)
        ):
            room = self._model.max_positions - position - (len(tokens) - known)
            if room < asked:
                which = "the prompt" if len(whole) == 1 else f"prompt {number + 1}"
                raise InvalidInputError(
                    f"{which} has {len(tokens)} tokens (with references that stand in it as text), "
                    f"which leaves room for {max(0, room)} new ones before the end of the model "
                    f"'{self._model.name}' at {self._model.max_positions}; {asked} are asked for. "
                    "Shorten the prompt, or ask for fewer."
                )
        return self._context

    # --- the answer ---

    def branch(self, answers: int) -> None:
        """Several answers to each prompt that was read: those to one prompt stand one behind the
        other in `readings`."""
        rows = [number for number in self._rows for _ in range(answers)]
        with self._timed("read"), self._whole():
            self._go_on_with(rows)
        self.readings = [self.readings[number].again() for number in rows]
        self._rows = list(range(len(rows)))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read the next token of each sequence that goes on; (sequences, vocabulary) logits. They
        were added to the readings; after each chunk of them, new memories take the place of the old
        ones. Sequences whose readings are finished leave."""
        assert self._context is not None
        going = [number for number in self._rows if not self.readings[number].finished]
        if going != self._rows:
            with self._timed("decode"), self._whole():
                self._go_on_with([self._rows.index(number) for number in going])
            self._rows = going
        size = self._options.retrieve_every
        self._said += 1
        if self._options.mode == "memory":
            if self._said % size == 0:
                self._remember_again()
            elif (self._said + self._options.prefetch) % size == 0:
                self._asked = self._rows
                self._lookup.begin(self._queries())
        self._look_at(None)
        with self._timed("decode"), self._whole():
            self._fix_steps()
            ids = uploaded(torch.tensor(list(tokens)), self._model.device)
            logits = self._context.step(ids, witness=self._watch)
            self._held.extend(tokens if self._held else [])
            self._note_attention()
        return logits

    def _fix_steps(self) -> None:
        """Where a GPU can record the steps that are left, it does, before the first of them."""
        assert self._context is not None
        left = self._options.max_new_tokens - self._said
        pays = self._steps_are_new and self._watch is None and left >= _WORTH
        if pays and records_steps(self._model.device):
            self._context.fix(left)
        self._steps_are_new = False

    def _remember_again(self) -> None:
        """New memories for what was just generated; where that says nothing, the old ones stay."""
        assert self._context is not None
        with self._timed("retrieve"):
            found, asked = self._lookup.ended(), self._asked
            if found is None:
                found, asked = self._lookup.find(self._queries()), self._rows
        new = dict(zip(asked, found, strict=True))
        in_use = self._context.memories
        for place, number in enumerate(self._rows):
            one, reading = new[number], self.readings[number]
            if one is not None:
                start = reading.prompt_tokens + len(reading.tokens)
                reading.chunks.append(Chunk(start, True, one.retrieval))
                in_use[place] = one.memories
        self._context.remember(in_use)

    def _queries(self) -> list[Query]:
        """The newest tokens of each sequence."""
        size = self._options.retrieve_every
        texts = [self.readings[number].all_tokens for number in self._rows]
        return [Query(text[-size:], text) for text in texts]

    def _go_on_with(self, rows: Sequence[int]) -> None:
        """Put a context with these sequences of the one in use in its place."""
        assert self._context is not None
        left = self._options.max_new_tokens - self._said
        self._context, self._held = self._context.branches(rows, left), []
        self._steps_are_new = True
        self._watch = self._new_watch(len(rows))

    # --- watching ---

    def _new_watch(self, batch: int) -> Watch | None:
        if not self._options.cite or self._options.mode != "memory":
            return None
        return Watch(
            batch,
            self._options.memories,
            self._db.shape.reference_length,
            self._model.heads_of_all_layers,
            self._model.device,
        )

    def _look_at(self, sequences: list[list[Stretch]] | None) -> None:
        if self._watch is None:
            return
        batch = len(self._rows)
        if sequences is None:
            self._watch.look_at(list(range(batch)), [0] * batch)
            return
        ends = np.cumsum([len(stretches) for stretches in sequences])
        last = [len(stretches[-1].tokens) - 1 for stretches in sequences]
        self._watch.look_at((ends - 1).tolist(), last)

    def _note_attention(self) -> None:
        if self._watch is None:
            return
        for number, attention in zip(self._rows, self._watch.take().numpy(), strict=True):
            reading = self.readings[number]
            if reading.chunks:
                reading.chunks[-1].watched(attention)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is interrupted leaves some layers longer than others, or than what they are said to
        hold: then the next prompt begins anew."""
        try:
            yield
        except BaseException:
            self._context, self._held = None, []
            raise

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began
