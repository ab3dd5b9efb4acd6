"""`python -m runtime.verify ARTIFACT`: is this folder whole, does it run here, and do its graphs agree with each other?

Needs nothing but the artifact. Opening it checks every rule of `runtime.artifact`. Then random ids go through the graphs three ways, which
must give the same logits: one by one, as one prefill, and as a prefill that decode continues.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bounds import relative_bound
from runtime.errors import UserError, run_command
from runtime.manifest import Manifest

MAX_TOKENS = 300
PAST_THE_END = 5  # tokens beyond a window or a chunk
SEED = 0

Logits = NDArray[np.float32]


class VerifiableEngine(Protocol):
    """What the check needs of an engine."""

    @property
    def manifest(self) -> Manifest:
        """The artifact's manifest."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Append one list of ids per row; logits (B, vocab) after the last ids."""

    def decode(self, ids: Sequence[int]) -> Logits:
        """Append one id per row; logits (B, vocab)."""

    def room(self) -> int | None:
        """How many more ids the caches take; None without a limit."""

    def reset(self) -> None:
        """Forget every id."""


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    check: str
    found: str
    expected: str
    ok: bool


def sequence_length(manifest: Manifest, room: int | None) -> int:
    """Tokens to feed: past the smallest cache if `MAX_TOKENS` allows, else past the largest chunk, and never more than fit."""
    smallest = min(manifest.model.cache_lens(manifest.shape.cache_len))
    affordable = [n + PAST_THE_END for n in (smallest, manifest.shape.prefill_chunks[0]) if n + PAST_THE_END <= MAX_TOKENS]
    wanted = affordable[0] if affordable else MAX_TOKENS
    return wanted if room is None else min(wanted, room)


def verify(engine: VerifiableEngine) -> tuple[Check, ...]:
    """Run the same ids three ways and compare; the engine's caches are emptied before and after."""
    engine.reset()
    manifest = engine.manifest
    length = sequence_length(manifest, engine.room())
    ids = np.random.default_rng(SEED).integers(manifest.model.vocab_size, size=(manifest.shape.batch, length))
    head = max(1, length - PAST_THE_END)
    stepwise = _decode(engine, ids)
    whole = _prefill(engine, ids)
    engine.reset()
    continued = np.concatenate([_prefill(engine, ids[:, :head]), _decode(engine, ids[:, head:], fresh=False)])
    engine.reset()
    bound = relative_bound(manifest.model, manifest.shape.cache_len, manifest.cache_dtype, rounded=manifest.quantization.dynamic)
    return (
        _finite(f"logits of {length} decode steps", stepwise),
        _finite(f"logits of a prefill of {length}", whole),
        _close("one prefill against decode steps", whole, stepwise[-1:], bound),
        _close(f"prefill of {head}, then decode, against decode steps", continued, stepwise[head - 1 :], bound),
    )


def _decode(engine: VerifiableEngine, ids: NDArray[np.int64], *, fresh: bool = True) -> Logits:
    """Logits (T, B, vocab) of each step."""
    if fresh:
        engine.reset()
    vocab_size = engine.manifest.model.vocab_size
    steps = [np.array(engine.decode(column.tolist()), np.float32) for column in ids.T]
    return np.stack(steps) if steps else np.empty((0, len(ids), vocab_size), np.float32)


def _prefill(engine: VerifiableEngine, ids: NDArray[np.int64]) -> Logits:
    """Logits (1, B, vocab) of the last ids."""
    engine.reset()
    return np.array(engine.prefill(ids.tolist()), np.float32)[None]


def _finite(name: str, logits: Logits) -> Check:
    wrong = int(np.count_nonzero(~np.isfinite(logits)))
    return Check(name, f"{wrong} not finite", "0 not finite", wrong == 0)


def _close(name: str, found: Logits, expected: Logits, bound: float) -> Check:
    """Compare row by row of the batch and step by step, each relative to its own largest logit."""
    assert found.shape == expected.shape, f"{name}: {found.shape} and {expected.shape}"
    largest = np.abs(expected).max(-1)
    difference = float((np.abs(found - expected).max(-1) / np.maximum(largest, np.finfo(np.float32).tiny)).max())
    return Check(name, f"{difference:.1e} relative", f"at most {bound:.1e}", bool(difference <= bound))  # NaN is not


def table(checks: Sequence[Check]) -> str:
    """The checks in aligned columns, under a heading."""
    rows = [("check", "found", "expected", "ok"), *((c.check, c.found, c.expected, "yes" if c.ok else "NO") for c in checks)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Verify one artifact; status 0 if every check holds, else 2."""
    parser = argparse.ArgumentParser(prog="python -m runtime.verify", description="Check that an artifact is whole and computes what it should.")
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from runtime.engine import Engine  # loads TVM's runtime, which `--help` and a wrong flag need not wait for

    engine = Engine.open(args.artifact, threads=args.threads)  # raises for a broken artifact
    n_files = len(engine.manifest.files) + 1
    checks = (Check("files", f"{n_files} sound", f"{n_files} sound", True), *verify(engine))
    ok = all(check.ok for check in checks)
    print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}) if args.json else table(checks))
    if not ok:
        failed = "; ".join(f"{c.check}: {c.found}, expected {c.expected}" for c in checks if not c.ok)
        raise UserError(f"{args.artifact} does not compute what it should on this machine ({failed}); compile it again")
    return 0


if __name__ == "__main__":
    run_command(main)
