"""The documentation as data: pages, code blocks, code in the text, links and the headings they lead to."""

import re
from collections.abc import Iterator
from pathlib import Path

from export.stage import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks in one language."""
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", page.read_text())


def code(page: Path) -> Iterator[str]:
    """Every line of a code block, and every piece of code in the text."""
    for _, text in BLOCK.findall(page.read_text()):
        yield from text.splitlines()
    yield from re.findall(r"`([^`]+)`", prose(page))


def links(page: Path) -> list[tuple[str, str]]:
    """File and anchor of every relative link."""
    found = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", prose(page))
    return [(target, anchor) for target, anchor in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Anchors by which a link may name a heading of the page, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
