"""Documents and code say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from loader.lifecycle import TRANSITIONS, State
from paddlewheel.cli.root import root

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))


def blocks(page: Path) -> list[str]:
    """The fenced and indented code blocks of a page."""
    text = page.read_text()
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}\S[^\n]*\n)+", text, re.MULTILINE)
    return [*fenced, *indented]


def commands() -> list[tuple[str, str]]:
    """Every line of a code block that calls our command: (page, line), without the prompt."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        for block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.strip().removeprefix("$ ")
                if words.startswith("paddlewheel "):
                    found.append((page.name, words))
    return found


def test_the_lifecycle_diagram_is_the_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"^ *([A-Z]+) --> ([A-Z]+)$", text, re.MULTILINE))
    table = {(str(old), str(new)) for old, news in TRANSITIONS.items() for new in news}
    assert drawn == table
    assert {state for edge in drawn for state in edge} == {str(state) for state in State}


def test_the_readme_shows_commands() -> None:
    assert any(page == "README.md" for page, _ in commands())


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_shown_exist_with_their_flags(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((n for n, w in enumerate(words) if w in {"|", "&", ">", "&&"}), None)]
    context = click.Context(root, info_name="paddlewheel")
    command: click.Command = root
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        below = command.get_command(context, words[0])
        assert below is not None, f"{page}: no command {words[0]!r}"
        command, words = below, words[1:]
    known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    known |= {"--help", "--version"}
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            assert word.partition("=")[0] in known, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
