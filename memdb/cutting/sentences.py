"""Where sentences end."""

from __future__ import annotations

import re
from collections.abc import Iterator

_CLOSING = "\"'”’»«›)\\]}*_`"
_WIDE_CLOSING = "」』”’》〉】）)\"'"
# Stops of scripts that put a space behind them, and of those that do not.
_END = re.compile(rf"[.!?…؟۔।॥։።။។]+[{_CLOSING}]*\s+|[。！？｡︒]+[{_WIDE_CLOSING}]*\s*")
_WORD = re.compile(r"[^\s(\[{\"'“‘«„]*\Z")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]\Z")
_LAST = 40  # characters that a word may have to be looked at

# What a full stop behind these does not end; nor behind those before a number; behind the last
# before a small letter.
_SHORT = re.compile(
    r"(mr|mrs|ms|mx|dr|prof|st|sr|fr|gen|col|sgt|capt|lt|maj|rev|hon|gov|sen|rep|messrs|mme|mlle"
    r"|vs|cf|eg|ie|viz|resp|approx|incl|excl|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
    r"|bzw|ca|vgl|sog|evtl|ggf|hrsg|abb|str|zb|dh|ua)\Z"
)
_NUMBERED = re.compile(r"(no|nos|nr|figs?|eqs?|vols?|ch|sec|art|ed|pp|op|bd|tel)\Z")
_AT_ENDS = re.compile(r"(dept|corp|bros)\Z")
_WHOLE = 4  # letters of a word that is hardly a short form


def sentence_ends(text: str) -> Iterator[int]:
    """Where the sentences of a text end, in order, the white space behind each included."""
    for found in _END.finditer(text):
        if _is_end(text, found):
            yield found.end()


def _is_end(text: str, found: re.Match[str]) -> bool:
    stop = found[0][0]
    if stop in "。！？｡︒":
        return True
    following = text[found.end() : found.end() + 1]
    if stop != "." or found[0].startswith(".."):
        return not following.islower()  # "Why?" he asked
    word = _WORD.search(text, max(0, found.start() - _LAST), found.start())
    before = "" if word is None else word[0].lower()
    if _SHORT.match(before.replace(".", "")) or _INITIALS.match(before):
        return False
    if _NUMBERED.match(before) and following.isdigit():
        return False
    if (
        before.isdigit()
        and len(before) < _WHOLE
        and _begins_line(text, found.start() - len(before))
    ):
        return False  # the number of an item
    if following.islower():
        return len(before) >= _WHOLE and not _AT_ENDS.match(before)
    return True


def _begins_line(text: str, at: int) -> bool:
    return not text[text.rfind("\n", 0, at) + 1 : at].strip()
