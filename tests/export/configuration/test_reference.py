"""docs/configuration.md is the output of its command, and describes every key."""

import subprocess
import sys

from export.configuration.config import CompileConfig, Section
from export.configuration.reference import reference
from export.stage import ROOT

PAGE = (ROOT / "docs" / "configuration.md").read_text()


def keys(section: type[Section], prefix: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, Section)
        found |= keys(kind, f"{prefix}{name}.") if inner else {f"{prefix}{field.alias or name}"}
    return found


def test_the_page_is_what_the_command_prints():
    command = [sys.executable, "-m", "export.configuration.reference"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == PAGE, "run `python -m export.configuration.reference > docs/configuration.md`"


def test_every_key_has_a_row():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} == keys(CompileConfig)
    assert len(rows) == len(keys(CompileConfig))


def test_values_and_defaults_are_those_of_each_target():
    page = reference()
    assert "on `llvm` also `source_dynamic`, `bf16_dot`, `int8_dynamic`, `int4_dynamic` | `source`" in page
    assert "| `fp32` on `llvm`, `fp16` on `cuda` |" in page
