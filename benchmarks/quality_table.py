"""The table of benchmarks/quality.py, in Markdown: a row a figure, a column a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quality_cells import Cell

#: A cell's figures, as `memdb eval --json` gives them.
Figures = Mapping[str, Any]
_Shown = Callable[[Figures], str]
_NONE = "-"
_NOTE = (
    "In brackets 95 % intervals, by paired bootstrap over questions. Share: what memory has of "
    "what RAG gains over nothing, in NLL; where that gain may be none, the NLL of memory less that "
    "of RAG."
)


def table(cells: Sequence[Cell], figures: Callable[[Cell], Figures | None]) -> str:
    """All that is finished; a dash where something is not, or cannot be.

    Args:
        cells: of all models.
        figures: of a cell; None: it is not finished.
    """
    models = list(dict.fromkeys(cell.model for cell in cells))
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        found = figures(cell)
        for title, shown in _rows(cell):
            row = rows.setdefault(title, {})
            if found is not None:
                row[cell.model] = shown(found)
    lines = [["", *models], ["---"] * (len(models) + 1)]
    lines += [[title, *(row.get(model, _NONE) for model in models)] for title, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{_NOTE}"


def _rows(cell: Cell) -> Iterator[tuple[str, _Shown]]:
    """Titles of a cell's rows, and what they show of its figures."""
    if cell.sees == "conversations":
        title = "conversations of two turns, right document first"
        yield f"{title}: whole / last message alone", lambda f: _value(f, "ratio")
        yield f"{title}: whole, last alone", _each_talk
        yield f"{title}: after a last message that only goes on", lambda f: _value(f, "following")
    elif cell.data == "facts":
        for kind in (None, "short", "medium", "long"):
            yield from _right("facts" + ("" if kind is None else f", {kind} texts"), kind)
        yield "facts, ranked first among eight: " + _ARMS, lambda f: _each(f, "ranked_first")
    else:
        yield from _shares(cell)


def _right(title: str, kind: str | None) -> Iterator[tuple[str, _Shown]]:
    def of(figures: Figures) -> Figures:
        return figures if kind is None else figures["kinds"].get(kind, {})

    name = "answers_right_better_ratio"
    yield f"{title}, right answers: memory / better RAG", lambda f: _value(of(f), name)
    yield f"{title}, right answers: {_ARMS}", lambda f: _each(of(f), "answers_right")


def _shares(cell: Cell) -> Iterator[tuple[str, _Shown]]:
    others = "" if cell.sees == "1" else " + 4" if cell.data == "squad" else " + 3"
    title = f"{cell.data}, gold{others}, 1/{cell.part}"
    for framing in ("plain", "chat") if cell.both else (None,):

        def of(figures: Figures, framing: str | None = framing) -> Figures:
            return figures if framing is None else figures["framings"].get(framing, {})

        where = "" if framing is None else f", {framing}"
        yield f"{title}{where}: share", lambda f, of=of: _share(of(f))  # type: ignore[misc]
        right = f"{title}{where}, right answers: {_ARMS}"
        yield right, lambda f, of=of: _each(of(f), "answers_right")  # type: ignore[misc]
        ranked = f"{title}{where}, ranked first among eight: {_ARMS}"
        yield ranked, lambda f, of=of: _each(of(f), "ranked_first")  # type: ignore[misc]
        if cell.controls:
            controls = f"{title}{where}, share of the prefix alone, of other memories"
            yield controls, lambda f, of=of: _controls(of(f))  # type: ignore[misc]
        if cell.texts:
            text = f"running text{where}: perplexity with memories / without"
            yield text, lambda f, of=of: _text(of(f))  # type: ignore[misc]


_ARMS = "nothing, RAG, memory"
_NAMES = ("nothing", "rag_1", "rag", "memory")


def _share(figures: Figures) -> str:
    """Memory's share of what RAG gains; where that gain may be none, memory's NLL less RAG's."""
    gain = figures.get("rag_gain_interval")
    if gain is not None and gain[0] <= 0 <= gain[1]:
        return "NLL " + _value(figures, "nll_difference", "{:+.2f}")
    return _value(figures, "share")


def _value(figures: Figures, name: str, form: str = "{:.2f}") -> str:
    value, interval = figures.get(name), figures.get(f"{name}_interval")
    if value is None:
        return _NONE
    ends = "" if interval is None else " ({} to {})".format(*map(form.format, interval))
    return form.format(value) + ends


def _each(figures: Figures, name: str) -> str:
    """A share of questions in each arm; of RAG with five references and, behind it, with one."""
    shown = []
    for arm in ("nothing", "rag", "memory"):
        value = figures.get(arm, {}).get(name)
        shown.append(_NONE if value is None else f"{value:.0%}")
        if arm == "rag":
            others = [
                f"{found:.0%} {which}"
                for key, which in (("rag_1", "with the nearest alone"), ("rag_near", "the near"))
                if (found := figures.get(key, {}).get(name)) is not None
            ]
            shown[-1] += f" ({', '.join(others)})" if others else ""
    return ", ".join(shown)


def _each_talk(figures: Figures) -> str:
    return ", ".join(f"{figures[name]:.0%}" for name in ("whole", "last"))


def _controls(figures: Figures) -> str:
    return ", ".join(_value(figures, f"share_{name}") for name in ("prefix", "other"))


def _text(figures: Figures) -> str:
    return _value(figures.get("running_text") or {}, "ratio")
