"""`--set key.path=value` on the command line."""

from functools import partial
from pathlib import Path
from random import Random

from export.configuration.config import CompileConfig, load_config
from tests.fuzz.mutations import spoil_bytes
from tests.fuzz.reader import Reader, demand
from tests.fuzz.readers.yaml_file import KEYS, VALUES

BASE = "name: x\nfrontend: {checkpoint: x}\nbackend: {target: llvm}\nshape: {cache_len: 64, prefill_chunk: 8}\n"
PATHS = [
    f"{section}.{name}" if section else name
    for section in ("", "frontend", "shape", "quantize", "backend", "workspace")
    for name in (CompileConfig if not section else CompileConfig.model_fields[section].annotation).model_fields
]


def open_reader(folder: Path) -> Reader:
    (folder / "x.yaml").write_text(BASE)
    known = {
        "two lines": b"name=a\nb",
        "a key of two lines": b"a\nb=1",
        "a lone surrogate": b"name=\xff",  # as Python hands over a byte on the command line that is not UTF-8
        "a key of 5000 parts": b".".join([b"a"] * 5000) + b"=1",
    }
    return Reader([b"shape.slots=2", b"backend.dtype=fp32"], spoil, partial(check, folder / "x.yaml"), known)


def spoil(draw: Random, data: bytes) -> bytes:
    """Another key, another value, or other bytes; no argument holds a zero byte."""
    kind = draw.random()
    text = f"{draw.choice(PATHS)}={draw.choice(VALUES)}"
    if kind < 0.2:
        text = f"{draw.choice(PATHS)}.{draw.choice(KEYS)}={draw.choice(VALUES)}"
    made = text.encode("utf-8", "surrogatepass") if kind < 0.8 else spoil_bytes(draw, data)
    return made.replace(b"\0", b"")


def check(path: Path, data: bytes) -> None:
    override = data.decode("utf-8", "surrogateescape")
    config = load_config(path, [override])
    demand(load_config(path, [override]) == config, "it is read in two ways")
