"""The README, the pages in docs/ and the Makefile agree with each other, with the configs and with the code."""

import re
import subprocess
from pathlib import Path

import pytest

from export.configuration.config import load_config
from export.stage import ROOT
from tests.helpers.pages import PAGES, README, anchors, code, links

MAKEFILE = (ROOT / "Makefile").read_text()
MOST_LINES, MOST_COLUMNS = 130, 120  # of the README; table rows may be longer
# external scripts rely on these
PROMISED = {"setup", "demo", "compile", "parity", "test", "bench", "ship", "check", "help"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_promised_targets_exist_and_help_tells_them():
    assert targets() >= PROMISED
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in PROMISED:
        assert re.search(rf"^  {name} +\S", shown, re.MULTILINE), name


def test_phony_lists_exactly_the_targets():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets()


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > MOST_COLUMNS and not line.startswith("|")] == []


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target).resolve() for target, _ in links(README)}
    assert set(PAGES) - {README} <= linked


@each_page
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@each_page
def test_commands_exist(page):
    for text in code(page):
        for name in re.findall(r"(?:^|&& )make ([a-z-]+)", text):
            assert name in targets(), name
        for module in re.findall(r"python -m ((?:export|build|runtime|tests)[.\w]*)", text):
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@each_page
def test_files_exist(page):
    """Every path of ours in code exists, except for names with a placeholder, such as OP."""
    for text in code(page):
        for name in re.findall(r"(?<![\w./-])(?:export|build|runtime|tests|yaml)/[\w./-]+", text):
            if not re.search(r"\b[A-Z]{2,}\b|\bx\.yaml$", name):
                assert (ROOT / name).exists(), name


@each_page
def test_modules_and_names_exist(page):
    """`runtime.errors.UserError` and the like name a module, or a name in it."""
    for text in code(page):
        if re.fullmatch(r"(?:export|build|runtime)(?:\.\w+)+", text):
            parts = text.split(".")
            path = next(
                path
                for end in range(len(parts), 0, -1)
                if (path := ROOT.joinpath(*parts[:end]).with_suffix(".py")).is_file()
                or (path := ROOT.joinpath(*parts[:end], "__init__.py")).is_file()
            )
            rest = parts[len(path.relative_to(ROOT).with_suffix("").parts) - (path.stem == "__init__") :]
            assert len(rest) <= 1, text
            assert not rest or re.search(rf"\b{rest[0]}\b", path.read_text()), text


@pytest.mark.parametrize("path", sorted((ROOT / "yaml").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert load_config(path).name


def test_every_shipped_config_is_told():
    told = (ROOT / "docs" / "models.md").read_text()
    for path in sorted((ROOT / "yaml").glob("*.yaml")):
        assert f"`yaml/{path.name}`" in told, path.name


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
    assert "Copyright [yyyy] [name of copyright owner]" in text


def test_the_changelog_has_this_version():
    version = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert version.group(1) in Path(ROOT / "CHANGELOG.md").read_text()


def test_direct_dependencies_are_locked():
    lock = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line
    }
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    named = {re.split(r"[=<>]", name)[0].lower().replace("_", "-") for name in re.findall(r'"([^"]+)"', block.group(1))}
    assert len(named) > 20
    assert named <= lock, named - lock
