"""What `memdb eval` prints: a table for each framing, and lines behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from cli.common import counted

if TYPE_CHECKING:  # it loads torch
    from model_adapter.evaluation import (
        ArmFigures,
        Compared,
        Evaluation,
        Figure,
        FramingFigures,
    )

_ARMS = {
    "nothing": "nothing",
    "rag": "text in the prompt (RAG)",
    "rag_1": "nearest reference as text",
    "rag_near": "near references as text",
    "memory": "memory",
    "prefix": "prefix alone",
    "other": "other memories",
}
_COLUMNS = {
    "nll": ("answer NLL", "{:.3f}"),
    "answers_right": ("right answers", "{:.1%}"),
    "em": ("exact match", "{:.1%}"),
    "f1": ("F1", "{:.1%}"),
    "seconds": ("s / question", "{:.2f}"),
}
#: Of each arm, on lines of their own: a table is no wider than a page.
_MORE = {
    "tokens_right": ("tokens right", "{:.1%}"),
    "ranked_first": ("ranked first among eight", "{:.1%}"),
    "nll_first": ("NLL of first tokens", "{:.2f}"),
    "nll_rest": ("NLL of the tokens behind them", "{:.2f}"),
}
_WIDTH = 100  # of a table where there is no terminal


def show(found: Evaluation) -> None:
    """Print an evaluation's figures."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    for framing in found.framings:
        console.print(_table(found, framing))
        for line in [*_lines(framing), *_kinds(framing)]:
            click.echo(line)
        click.echo()
    stored = ", ".join(found.best.size.codecs)
    click.echo(
        f"adapter {found.adapter}, selection {found.selection}, budget {found.budget} of a "
        "128-token reference, "
        f"{counted(len(found.layers), 'layer')}, codec {found.codec}"
        + (f" (stored as {stored})" if stored not in ("", found.codec) else "")
        + f"; in brackets 95 % intervals\nkept in {found.work}"
    )


def _table(found: Evaluation, framing: FramingFigures) -> Table:
    table = Table(
        title=f"{found.model}, {framing.framing} framing, "
        f"{counted(found.questions, 'question')}, references: {found.references}",
        show_lines=True,
    )
    shown = [name for name in _COLUMNS if getattr(framing.memory, name) is not None]
    table.add_column("what the model sees")
    for name in shown:
        table.add_column(_COLUMNS[name][0], justify="right")
    for name, arm in framing.arms.items():
        table.add_row(_ARMS[name], *_cells(arm, shown))
    return table


def _cells(arm: ArmFigures, shown: Sequence[str]) -> list[str]:
    return [
        _form(name).format(getattr(arm, name)) + "\n" + _interval(arm.intervals[name], _form(name))
        for name in shown
    ]


def _form(name: str) -> str:
    return _COLUMNS[name][1]


def _lines(framing: FramingFigures) -> list[str]:
    lines = []
    if framing.share is None:
        lines.append("share of RAG's gain: none, since RAG gains nothing here")
    else:
        lines.append(
            f"share of RAG's gain: memory has {framing.share:.2f} "
            f"{_interval(framing.share_interval, '{:.2f}')} of what RAG gains over nothing, in NLL"
        )
    for name, what, form in (
        ("share_prefix", "of it the prefix alone has", "{:.2f}"),
        ("share_other", "of it memories of another article have", "{:.2f}"),
        ("nll_difference", "NLL of memory less RAG's:", "{:+.3f}"),
        ("answers_right_difference", "right answers of memory less RAG's:", "{:+.1%}"),
        (
            "answers_right_better_ratio",
            "right answers of memory over the best RAG's (5 references, near ones, the nearest):",
            "{:.2f}",
        ),
        ("f1_difference", "F1 of memory less RAG's:", "{:+.1%}"),
    ):
        if framing.compared[name][0] is not None:
            lines.append(f"{what} {_figure(framing.compared[name], form)}")
    lines += [
        f"{what}: {_each(framing, name, form)}"
        for name, (what, form) in _MORE.items()
        if getattr(framing.memory, name) is not None
    ]
    recall = framing.recall
    several = recall["recall_all_at_5"] != recall["recall_at_5"]
    lines.append(
        f"recall of the document: @1 {_figure(recall['recall_at_1'], '{:.1%}')}, "
        f"@5 {_figure(recall['recall_at_5'], '{:.1%}')}"
        + (f", of all documents {_figure(recall['recall_all_at_5'], '{:.1%}')}" * several)
    )
    lines.append(
        f"stored: {framing.size.reference:,.0f} bytes a reference, "
        f"{framing.size.tokens_128:,.0f} for 128 tokens"
    )
    text = framing.running_text
    if text is not None:
        lines.append(
            f"running text: perplexity {text.perplexity_with:.2f} with memories, "
            f"{text.perplexity_without:.2f} without, ratio {text.ratio:.3f} "
            f"{_interval(text.ratio_interval, '{:.3f}')} ({text.tokens:,} tokens of "
            f"{counted(text.documents, 'document')}; "
            f"{counted(text.dropped, 'reference')} dropped that say the same)"
        )
    return lines


def _kinds(framing: FramingFigures) -> list[str]:
    return [f"{kind}: {_kind(one)}" for kind, one in framing.kinds.items()]


def _kind(one: Compared) -> str:
    """A kind's share, and its right answers or its NLL in each arm."""
    name = "nll" if one.memory.answers_right is None else "answers_right"
    what, form = _COLUMNS[name]
    share = "none" if one.share is None else _figure(one.compared["share"], "{:.2f}")
    return f"{counted(one.n, 'question')}, {what}: {_each(one, name, form)}; share {share}"


def _each(one: Compared, name: str, form: str) -> str:
    """A figure of every arm."""
    return ", ".join(f"{arm} {form.format(getattr(of, name))}" for arm, of in one.arms.items())


def _figure(figure: Figure, form: str) -> str:
    return f"{form.format(figure[0])} {_interval(figure[1], form)}"


def _interval(interval: Sequence[float] | None, form: str) -> str:
    if interval is None:
        return ""
    return f"[{form.format(interval[0])}, {form.format(interval[1])}]"
