"""Drawing passages: what each step of training is about.

What a step draws depends on the seed and the step's number alone, so a run that was interrupted
goes on as if it had not been.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memdb import Framing, InvalidInputError
from model_adapter.training.cloze import sentences
from model_adapter.training.corpus import Corpus, Reference, worth_asking
from model_adapter.training.examples import Example, Examples, Framed, Row
from model_adapter.training.recipe import Recipe

_NEAR = 3  # documents on either side that distractors come from, too
_RECENT = 200  # passages back that other distractors come from
_FEW = 3  # examples; a passage with fewer is not worth its encoding
_ATTEMPTS = 20
_ONE_GOLD = 0.7  # share of passages that are one reference
_SENTENCES = 3  # at most, of a short reference


@dataclass(frozen=True)
class Passage:
    """A passage among references, and examples about it.

    Attributes:
        gold: what the teacher reads: its references, consecutive ones of a document; or, where the
            text of the passage is read behind other references, these.
        memory: the references that are remembered, the gold ones among them, in no order.
        framing: of the examples.
        budget: pairs that are kept of a reference of 128 tokens.
        rows: the examples as tokens.
        examples: as texts.
    """

    gold: tuple[Reference, ...]
    memory: tuple[Reference, ...]
    framing: Framing
    budget: int
    rows: tuple[Row, ...]
    examples: tuple[Example, ...]


class Draw:
    """Draws passages.

    Args:
        corpus: what from.
        examples: what can be asked.
        frames: by framing.
        recipe: how.
    """

    def __init__(
        self,
        corpus: Corpus,
        examples: Examples,
        frames: dict[Framing, Framed],
        recipe: Recipe,
    ) -> None:
        self._corpus = corpus
        self._examples = examples
        self._frames = frames
        self._recipe = recipe
        self._golds = [r for r in corpus.references if worth_asking(r)]
        self._all = corpus.references
        self._orders: dict[int, list[int]] = {}

    def passage(self, number: int) -> Passage:
        """The passage of a number, from 0: each reference comes once before any comes again, in
        another order each time. (One about which little can be asked gives way to another.)

        Raises:
            InvalidInputError: nothing can be asked about any reference.
        """
        best: Passage | None = None
        for attempt in range(_ATTEMPTS):
            rng = random.Random(f"{self._recipe.seed} {number} {attempt}")
            first = self._gold(number) if attempt == 0 else rng.choice(self._golds)
            way = self._framing(first, number), rng.choice(self._recipe.budgets)
            recent = self._recent(number, way[0])
            kind = random.Random(f"kind {self._recipe.seed} {number} {attempt}").random()
            if kind < self._recipe.unrelated:
                found = self._unrelated(first, rng, way, recent)
                if found is not None:
                    return found
            short = kind < self._recipe.unrelated + self._recipe.short
            found = self._about(first, rng, way, recent, short=short)
            if found is not None and (best is None or len(found.rows) > len(best.rows)):
                best = found
            if best is not None and len(best.rows) >= min(_FEW, self._recipe.examples):
                break
        if best is None:
            raise InvalidInputError(
                "nothing can be asked about the corpus: its texts have no sentences with names, "
                "numbers or rare words"
            )
        return best

    def _framing(self, reference: Reference, number: int) -> Framing:
        """Documents take turns, with each time that all references came: so each reference is
        needed in one framing at a time, and what it keeps has to be found once."""
        framings = self._recipe.framings
        turn = reference.document + number // len(self._golds)
        return framings[turn % len(framings)]

    def _recent(self, number: int, framing: Framing) -> list[Reference]:
        """References that training came by lately, in this framing: what they keep is known."""
        epoch = number - number % len(self._golds)
        lately = [self._gold(n) for n in range(max(epoch, number - _RECENT), number)]
        return [gold for gold in lately if self._framing(gold, number) == framing]

    def held_out(self) -> list[Passage]:
        """Passages to measure by, one of each document: framings and budgets in turn."""
        recipe = self._recipe
        ways = [(f, b) for f in recipe.framings for b in recipe.budgets]
        found: list[Passage] = []
        for document in self._corpus.documents:
            rng = random.Random(f"held out {recipe.seed} {len(found)}")
            usable = [reference for reference in document if worth_asking(reference)]
            if usable:
                way = ways[len(found) % len(ways)]
                passage = self._about(rng.choice(usable), rng, way, [])
                if passage is not None:
                    found.append(passage)
        return found

    def _gold(self, number: int) -> Reference:
        epoch, place = divmod(number, len(self._golds))
        if epoch not in self._orders:
            order = list(range(len(self._golds)))
            random.Random(f"{self._recipe.seed} epoch {epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._golds[self._orders[epoch][place]]

    def _about(
        self,
        first: Reference,
        rng: random.Random,
        way: tuple[Framing, int],
        recent: Sequence[Reference],
        *,
        short: bool = False,
    ) -> Passage | None:
        """A passage that begins with a reference; framing and budget are the way it is read. With
        `short`, each reference is a few sentences of one."""
        recipe = self._recipe
        framing, budget = way
        count = rng.randint(*recipe.references)
        most = min(recipe.gold, count)
        wanted = 1 if most == 1 or rng.random() < _ONE_GOLD else rng.randint(2, most)
        document = self._corpus.documents[first.document]
        at = document.index(first)
        gold = [first]
        for reference in document[at + 1 : at + wanted]:
            if reference.ordinal != gold[-1].ordinal + 1:  # what is between was left out
                break
            gold.append(reference)
        others = self._distractors(gold, count - len(gold), rng, recent)
        if short:
            gold, others = [self._cut(gold[0], rng)], [self._cut(other, rng) for other in others]
        memory = gold + others
        rng.shuffle(memory)
        rows: dict[Row, Example] = {}
        for example in self._examples.about(gold, rng, recipe.examples):
            row = self._frames[framing].row(example)
            if row is not None and len(rows) < recipe.examples:
                rows.setdefault(row, example)
        if not rows:
            return None
        return Passage(
            tuple(gold), tuple(memory), framing, budget, tuple(rows), tuple(rows.values())
        )

    def _unrelated(
        self,
        first: Reference,
        rng: random.Random,
        way: tuple[Framing, int],
        recent: Sequence[Reference],
    ) -> Passage | None:
        """The text of a reference, as running text, behind others: what is remembered says nothing
        of it, and should help or harm as little as the same texts in the prompt would."""
        framing, budget = way
        count = rng.randint(*self._recipe.references)
        others = tuple(self._distractors([first], count, rng, recent))
        example = Example("", first.text)
        row = self._frames[framing].row(example)
        if row is None or not others:
            return None
        return Passage(others, others, framing, budget, (row,), (example,))

    def _cut(self, reference: Reference, rng: random.Random) -> Reference:
        """A few sentences in a row of a reference; itself, if it has no more than that."""
        there = sentences(reference.text)
        count = rng.randint(1, _SENTENCES)
        if len(there) <= count:
            return reference
        at = rng.randrange(len(there) - count + 1)
        text = " ".join(there[at : at + count])
        tokens = tuple(next(iter(self._frames.values())).tokens(text))
        if len(tokens) > len(reference.tokens):
            return reference
        return replace(reference, text=text, tokens=tokens, part=True)

    def _distractors(
        self,
        gold: Sequence[Reference],
        count: int,
        rng: random.Random,
        recent: Sequence[Reference],
    ) -> list[Reference]:
        """Other references: half of them, as far as there are such, from near by; the others
        recent ones, as long as there are some."""
        number, step = gold[0].document, len(self._recipe.framings)
        first = number - _NEAR // step * step  # of those that are read in the same framing
        around = self._corpus.documents[max(first, number % step) : number + _NEAR + 1 : step]
        near = [r for document in around for r in document if r not in gold]
        found = rng.sample(near, min(len(near), (count + 1) // 2))
        for attempt in range(20 * count):  # a corpus may be small, and what is recent still smaller
            if len(found) == count:
                break
            other = rng.choice(recent if recent and attempt < 10 * count else self._all)
            if other not in found and other not in gold:
                found.append(other)
        return found
