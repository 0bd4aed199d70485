"""What an ingest did, as `memdb ingest` says it."""

from __future__ import annotations

from collections.abc import Iterable

import click

from cli.common import counted, notify, print_json
from memdb import Gathered, IngestReport

_NAMED = 10  # files that are named


def show(report: IngestReport, prune: bool, as_json: bool, gathered: Gathered | None) -> None:
    """Say what was done, and of which files.

    Args:
        report: it.
        prune: whether documents were to be deleted.
        as_json: as one object.
        gathered: if all files that were passed over are to be named.
    """
    if gathered is not None:
        for one in gathered.passed_over:
            notify(f"passed over: {one.problem or one.name} ({one.why})")
    for line in shortened(report.notes if gathered is None else gathered.notes):
        notify(line)
    if as_json:
        print_json(vars(report))
        return
    click.echo(done(report, prune))
    if set(report.kinds) - {"jsonl"}:
        there = sum(report.kinds.values())
        click.echo(f"{counted(there, 'document')}: {_counts(report.kinds.items())}")
    passed = [*report.passed_over.items()]
    if report.blank_rows:
        passed.append(("rows without text", report.blank_rows))
    if passed:
        click.echo(f"passed over: {_counts(passed)}")


def done(report: IngestReport, prune: bool) -> str:
    """What was done, on a line."""
    deleted = f", {report.deleted} deleted" if prune else ""
    return (
        f"{counted(report.inserted, 'document')} inserted, {report.updated} updated, "
        f"{report.unchanged} unchanged{deleted}; {counted(report.references, 'reference')} and "
        f"{counted(report.memories, 'memory', 'memories')} written"
    )


def shortened(lines: Iterable[str]) -> list[str]:
    """Lines, not too many."""
    lines = list(lines)
    if len(lines) <= _NAMED:
        return lines
    return [*lines[:_NAMED], f"and {len(lines) - _NAMED} more (-v names all)"]


def _counts(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {what}" for what, count in items)
