"""Turns of a prompt: who says what, into which chunks it is cut, and what each is looked up by.

A query is words of one turn. Were it the last 64 tokens, whoever said them, a short question behind
a long answer would be looked up by the answer. A turn too short to say what it is about ("And
when?") is looked up twice: by itself, and by itself with what was said before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: A turn of the user with fewer tokens than this is looked up with what was said before, too.
SHORT = 10

#: By this the scores of what is found with what was said before count less than the turn's own.
#:
#: Follow-ups need those references ("Where did they come from?"), and by itself such a turn finds
#: nothing with a score that comes near them. A new question that is as short finds its own, and
#: keeps them only if the others count less: what was said before is long, so their scores are high.
#: (SQuAD, the first document of new questions of less than 10 tokens, and of "Who were they and
#: what did they do?": counted in full 0.16 and 0.97, 0.6 times 0.64 and 0.88, half 0.70 and 0.48;
#: the turn alone 0.72 and 0.)
BEFORE = 0.6

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What somebody says in a prompt.

    Attributes:
        role: who; a prompt that is a text is one turn of the user.
        start: of its words, among the tokens of the prompt's content.
        end: behind them. What stands between two turns (control tokens, role words) is in neither.
    """

    role: Role
    start: int
    end: int


@dataclass(frozen=True)
class Cut:
    """A stretch of a prompt that is looked up for itself.

    Attributes:
        turn: whose words are in it. What stands before a turn's first word belongs to its first
            stretch.
        start: its first token.
        end: behind its last.
        words: token ids that it is looked up by: the turn's last ones up to here, at most as many
            as a chunk has.
        before: of a very short turn, the ends of the turns before it, the oldest first, with which
            it is looked up once more.
    """

    turn: Turn
    start: int
    end: int
    words: Sequence[int]
    before: Sequence[Sequence[int]] = ()


def cuts_of(content: Sequence[int], turns: Sequence[Turn], size: int) -> list[Cut]:
    """A prompt as stretches of at most `size` words, each of one turn.

    Args:
        content: token ids of the prompt.
        turns: in their order; the last ends where the content does.
        size: tokens of a chunk, at least 1.
    """
    made: list[Cut] = []
    for number, turn in enumerate(turns):
        before: list[Sequence[int]] = []
        length = turn.end - turn.start
        if turn.role == "user" and length < SHORT:
            before = _before(content, turns[:number], size - length)
        for end in [*range(turn.start + size, turn.end, size), turn.end]:
            words = content[max(turn.start, end - size) : end]
            start = made[-1].end if made else 0
            if start < end:
                made.append(Cut(turn, start, end, words, before))
    return made


def _before(content: Sequence[int], turns: Sequence[Turn], room: int) -> list[Sequence[int]]:
    """The last words of user and assistant, at most `room` tokens of them."""
    found: list[Sequence[int]] = []
    for turn in reversed(turns):
        words = content[max(turn.start, turn.end - room) : turn.end]
        if turn.role != "system" and words:
            found.insert(0, words)
            room -= len(words)
    return found
