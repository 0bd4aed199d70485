"""Every command that the documentation shows is one: program, options, targets, links."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from cli.commands import COMMANDS
from cli.main import main
from tests.docs.pages import PAGES, ROOT, commands, name_of

SHOWN = [(page, line) for page in PAGES for line in dict.fromkeys(commands(page))]


def words_of(line: str) -> list[str]:
    """Of a command line; what may be left out is there."""
    words = shlex.split(re.sub(r"\[([^\]']*-[^\]']*)\]", r"\1", line))
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    return words[: words.index("|")] if "|" in words else words


def require_command(words: list[str]) -> None:
    """Raise a `click.UsageError` where `memdb` does not know a command, or an option of it."""
    context = click.Context(main, info_name="memdb")
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found is not None, f"there is no command '{words[0]}'"
        command, words = found, words[1:]
        context = click.Context(command, parent=context)
    if not isinstance(command, click.Group):
        command.make_parser(context).parse_args([word for word in words if word != "..."])


@pytest.mark.parametrize(
    ("page", "line"), SHOWN, ids=[f"{name_of(page)}: {line}" for page, line in SHOWN]
)
def test_a_command_is_one(page: Path, line: str) -> None:
    program, *words = words_of(line)
    name = Path(program).name
    if name == "memdb":
        require_command(words)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = re.findall(r"^(\w+) [:?]?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words:
            target, given, _ = word.partition("=")
            assert target in (variables if given else targets), word
    elif name == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = set(project["optional-dependencies"])
        for word in words:
            if wanted := re.search(r"\[([\w,]+)\]", word):
                assert set(wanted[1].split(",")) <= extras, word
            elif word.startswith("."):
                assert (ROOT / word).exists(), word
    elif name.startswith("python") and words[0] != "-m":
        code = (ROOT / words[0]).read_text()
        for word in words[1:]:
            if word.startswith("--"):
                assert f'"{word.partition("=")[0]}' in code, f"{words[0]} has no {word}"


def test_there_are_commands_to_look_at() -> None:
    assert len(SHOWN) > 60


@pytest.mark.parametrize("command", [entry.name for entry in COMMANDS])
def test_the_docs_name_every_command(command: str) -> None:
    assert f"`memdb {command}" in (ROOT / "docs" / "commands.md").read_text() or re.search(
        rf"`memdb [^|]*`{command}`", (ROOT / "docs" / "commands.md").read_text()
    )


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target, place in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]+))?\)", page.read_text()):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{target} is not there"
        if place:
            assert place in anchors(file), f"{target} has no {place}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
