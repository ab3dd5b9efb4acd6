"""`python -m export.configuration.reference > docs/configuration.md`: document every key of a config from its field.

A key's meaning is its field's `title`. The values that a target takes and the defaults are found by trying configs.
"""

from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from export.configuration.config import CompileConfig, Section
from export.configuration.yaml_source import yaml_text
from runtime.artifact.targets import TARGETS

KINDS = tuple(TARGETS)
HEADER = """\
# Configuration

<!-- Printed by `python -m export.configuration.reference`, as a test checks; edit export/configuration/config.py. -->

A config is one YAML file. Three keys are required, and everything else has a default, which the compile prints:

```yaml
name: my-mistral
frontend:
  checkpoint: models/My-Mistral-7B
backend:
  target: llvm
```

`make compile CONFIG=my-mistral.yaml` compiles it to `out/my-mistral/`. `SET` overrides single keys on the command line,
and the last value of a key wins:

```bash
make compile CONFIG=my-mistral.yaml SET="quantize.scheme=int8 shape.cache_len=8192"
.venv/bin/python -m build my-mistral.yaml --set quantize.scheme=int8 --set shape.prefill_chunk=[128,16]
```

An unknown key or a wrong value is an error that names the line, what was found and what was expected.
YAML is read by the rules of version 1.2: `1e-5` is a number and `no` is text. Aliases and tags are refused.
"""
FOOTER = """\
## Before and after a compile

`make plan CONFIG=...` says, from the checkpoint's headers alone, what a compile will produce and need. The compile
prints the same lines with measured values.

A compile can be resumed: the result of each stage is stored under a key of the config, the checkpoint, the project's
code and the versions of the tools. If nothing has changed, it takes seconds. A killed run leaves no half-made artifact,
and the next run continues from the finished stages.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([HEADER, *_tables("At the top level", "", CompileConfig, ""), FOOTER])


def main() -> None:
    """Print the page."""
    print(reference(), end="")


def _tables(heading: str, meaning: str, section: type[Section], prefix: str) -> Iterator[str]:
    """A section's own keys as a table, then the sections in it, each under its own heading."""
    inner: list[tuple[str, str, type[Section]]] = []
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        key, kind = f"{prefix}{field.alias or name}", field.annotation
        assert field.title, f"{key} has no title to say what it means"
        if isinstance(kind, type) and issubclass(kind, Section):
            inner.append((key, field.title, kind))
        else:
            rows.append(f"| `{key}` | {_values(key, field)} | {_default(key, field)} | {field.title} |")
    yield "\n\n".join(filter(None, [f"## {heading}", meaning, "\n".join(rows)])) + "\n"
    for key, title, kind in inner:
        yield from _tables(f"`{key}`", title, kind, f"{key}.")


def _values(key: str, field: FieldInfo) -> str:
    """The values that a key takes; named values that only some targets take are listed separately."""
    names = ("true", "false") if field.annotation is bool else get_args(field.annotation)
    if not names or not all(isinstance(name, str | int) for name in names):
        assert field.description is not None, f"{key} has no description to say what it takes"
        return field.description
    if key == "backend.target":
        return _code(names)
    takers = {name: tuple(target for target in KINDS if _config(target, key, name)) for name in names}
    assert all(takers.values()), f"{key} has a value that no target takes: {takers}"
    parts = [_code([name for name in names if takers[name] == KINDS])]
    for targets in sorted(set(takers.values()) - {KINDS}):
        parts.append(f"on {_code(targets)} also {_code([name for name in names if takers[name] == targets])}")
    return "; ".join(parts)


def _default(key: str, field: FieldInfo) -> str:
    """The default of a key, by target if targets differ."""
    if field.is_required():
        return "required"
    texts = {target: _value(target, key) for target in KINDS}
    if len(set(texts.values())) == 1:
        return f"`{texts[KINDS[0]]}`"
    return ", ".join(f"`{text}` on `{target}`" for target, text in texts.items())


def _value(target: str, key: str) -> str:
    """A default as YAML."""
    config = _config(target)
    assert config is not None, f"the minimal config for {target} is not valid"
    value = config.model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        value = value[part]
    return yaml_text(value)


def _config(target: str, key: str = "", value: object = None) -> CompileConfig | None:
    """The minimal config for a target, with one key set; None if it is refused."""
    data: dict[str, dict[str, object] | str] = {
        "name": "x",
        "frontend": {"checkpoint": "x"},
        "backend": {"target": target},
    }
    if key:
        section, _, name = key.partition(".")
        given = data.setdefault(section, {})
        assert isinstance(given, dict), f"{key} is not in a section"
        given[name] = {"true": True, "false": False}.get(str(value), value)
    try:
        return CompileConfig.model_validate(data)
    except ValidationError:
        return None


def _code(names: Sequence[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
