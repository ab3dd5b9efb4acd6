"""The README and the Makefile tell the truth about each other, the configs and the code."""

import re
import subprocess

import pytest

from export.configuration.config import CompileConfig, Section, load_config
from export.stage import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROMISED = {
    "setup",
    "demo",
    "compile",
    "parity",
    "test",
    "bench",
    "ship",
    "check",
    "help",
}  # scripts outside rely on these


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def test_promised_targets_exist_and_help_tells_them():
    assert targets() >= PROMISED
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in PROMISED:
        assert re.search(rf"^  {name} +\S", shown, re.MULTILINE), name


def test_phony_lists_exactly_the_targets():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets()


def test_commands_in_the_readme_exist():
    for name in re.findall(r"^make ([a-z]+)", README, re.MULTILINE):
        assert name in targets(), name
    for module in re.findall(r"python -m ((?:export|build|runtime)[.\w]*)", README):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("path", sorted((ROOT / "yaml").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert load_config(path).name


def test_readme_tells_every_key():
    def keys(section: type[Section], prefix: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            kind = field.annotation
            inner = isinstance(kind, type) and issubclass(kind, Section)
            found |= keys(kind, f"{prefix}{name}.") if inner else {f"{prefix}{field.alias or name}"}
        return found

    for key in keys(CompileConfig) - {"workspace.workers"}:
        assert f"`{key}`" in README, key
    assert "`.workers`" in README


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
