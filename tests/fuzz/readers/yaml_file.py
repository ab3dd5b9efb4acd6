"""The YAML of a compile; one that is accepted must say the same when it is printed with all its defaults."""

from functools import partial
from pathlib import Path
from random import Random

from export.configuration.config import describe_defaults, load_config
from export.stage import ROOT
from tests.fuzz.mutations import DEEP, EXTREMES, spoil_bytes
from tests.fuzz.reader import Reader, demand, place

VALUES = (
    "null", "~", "true", "yes", "1_000", "0x10", "0o17", "017", "0b1", "1e3", "1e999", ".inf", ".nan", "-0", "12:30",
    "2024-01-01", "9" * 5000, "0x" + "f" * 5000, "''", '"\\ud800"', '"\\x1b[2J"', '"a\\nb"', "'\u2028'", "[]", "{}",
    "[[]]", "[1, 1]", "[128, 16, 4]", "[sm_80, sm_80]", "&a 1", "*a", "&a [*a]", "!!python/object/apply:os.system [ls]",
    "!!binary aGk=", "!!set {a}", "!!float 1", "!x y", "? {a: 1}", "[" * 500 + "]" * 500, "[" * DEEP, "{a: " * 500,
    "|\n  text", ">\n  text", "<<: {a: 1}", "a: b: c", "\t1", "- 1", "%TAG", "---\n1", "...\n", "#", "x" * 100_000,
    "int8", "int4", "cuda", "llvm", "fp32", "bf16", "znver4", "native", *map(str, EXTREMES),
)  # fmt: skip
KEYS = ("<<", "frontend", "shape", "slots", "x", "''", "? a", "[a]", "{a: 1}", "1", "null", '"\\ud800"', "k" * 2000)


def open_reader(folder: Path) -> Reader:
    seeds = [path.read_bytes() for path in sorted((ROOT / "yaml").glob("*.yaml"))]
    known = {
        "a key of two lines": b'name: x\n"a\\nb": 1\n',
        "the end of a document as a value": b"name: ...\n",
        "a lone surrogate": b'name: "\\ud800"\nfrontend: {checkpoint: x}\nbackend: {target: llvm}\n',
        "a deep list": b"name: " + b"[" * DEEP,
        "a number of 5000 digits": b"shape: {slots: " + b"9" * 5000 + b"}",
    }
    return Reader(seeds, spoil, partial(check, folder), known)


def spoil(draw: Random, data: bytes) -> bytes:
    """Change a line's value, key, indentation or place, or any bytes."""
    lines = data.decode().split("\n")
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        kind = draw.random()
        if kind < 0.55 and colon:
            lines[at] = f"{key}: {draw.choice(VALUES)}"
        elif kind < 0.7:
            indent = " " * (len(key) - len(key.lstrip()))
            lines.insert(at, f"{indent}{draw.choice(KEYS)}: {draw.choice(VALUES)}")
        elif kind < 0.8:
            lines[at] = " " * draw.randrange(4) + lines[at].strip()
        elif kind < 0.9:
            lines.insert(at, draw.choice(lines))
        else:
            return spoil_bytes(draw, "\n".join(lines).encode())
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def check(folder: Path, data: bytes) -> None:
    config = load_config(place(folder / "x.yaml", data))
    printed = "\n".join(describe_defaults(config))
    again = load_config(place(folder / "again.yaml", printed.encode()))
    demand(again == config, "it says something else when it is printed and read again")
