"""`python -m runtime.verify ARTIFACT`: is this folder intact, does it run here, and does it compute what it should?

It needs nothing but the artifact. Opening it checks every rule of `runtime.artifact.folder`, and the signature if a
public key is given. Then random ids go through every slot in three ways, which must give the same logits: one by one,
as one prefill, and as a prefill that steps continue. On a CPU they must be the same bits. If the device draws ids by
itself, they must be the likeliest. Last come the golden prompts that `make ship` adds: they must give the same outputs
and greedy tokens as on the machine that compiled the artifact, within the bound.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.bounds import relative_bound
from runtime.artifact.build_number import add_minimum_build
from runtime.artifact.golden import PAST_THE_END, GoldenPrompt, read_golden, sequence_length
from runtime.artifact.manifest import Manifest
from runtime.artifact.signing import add_public_key, key_of_environment
from runtime.artifact.targets import TARGETS
from runtime.columns import in_columns
from runtime.decoding.options import GREEDY
from runtime.decoding.sampler import DrawingModel, Sampler
from runtime.errors import UserError, run_command

SEED = 0

Logits = NDArray[np.float32]


class VerifiableEngine(Protocol):
    """The interface that the check needs of an engine with several texts, such as `SideBySide`."""

    @property
    def batch(self) -> int:
        """Texts that advance together."""

    @property
    def manifest(self) -> Manifest:
        """The artifact's manifest."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Append one list of ids to each text; returns logits (B, vocab) after the last ids."""

    def decode(self, ids: Sequence[int]) -> Logits:
        """Append one id to each text; returns logits (B, vocab)."""

    def room(self) -> int | None:
        """How many more ids fit the caches; None without a limit."""

    def head_outputs(self, ids: Sequence[int]) -> Logits:
        """The outputs of a head that generates no text for a text: (tokens or 1, n_outputs)."""

    def reset(self) -> None:
        """Forget every id."""


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    check: str
    found: str
    expected: str
    ok: bool


def bound_of(manifest: Manifest) -> float:
    """How far apart two correct computations may be, relative to the largest output."""
    return relative_bound(
        manifest.model, manifest.shape.cache_len, manifest.cache_dtype, manifest.quantization.rounding
    )


def verify(engine: VerifiableEngine) -> tuple[Check, ...]:
    """Run the same ids in three ways and compare.

    The engine's caches are emptied before and after. The model must generate text.
    """
    engine.reset()
    manifest = engine.manifest
    length = sequence_length(manifest.model, manifest.shape, engine.room())
    ids = np.random.default_rng(SEED).integers(manifest.model.vocab_size, size=(engine.batch, length))
    head = max(1, length - PAST_THE_END)
    stepwise = _decode(engine, ids)
    whole = _prefill(engine, ids)
    engine.reset()
    continued = np.concatenate([_prefill(engine, ids[:, :head]), _decode(engine, ids[:, head:], fresh=False)])
    engine.reset()
    bound = 0.0 if TARGETS[manifest.target.kind].same_bits_in_any_call else bound_of(manifest)
    return (
        _finite(f"logits of {length} decode steps", stepwise),
        _finite(f"logits of a prefill of {length}", whole),
        _close("one prefill against decode steps", whole, stepwise[-1:], bound),
        _close(f"prefill of {head}, then decode, against decode steps", continued, stepwise[head - 1 :], bound),
    )


def verify_draws(engine: VerifiableEngine) -> tuple[Check, ...]:
    """Compare the ids that the device draws greedily after a prompt of one text with the largest logits of steps.

    Empty if the device cannot draw. The engine's caches are emptied before and after.
    """
    engine.reset()
    length = sequence_length(engine.manifest.model, engine.manifest.shape, engine.room())
    steps = min(length - 1, PAST_THE_END)
    if not (isinstance(engine, DrawingModel) and engine.can_draw(GREEDY) and steps):
        return ()
    vocab_size = engine.manifest.model.vocab_size
    ids = np.random.default_rng(SEED).integers(vocab_size, size=(1, length - steps))
    first = int(_prefill(engine, ids)[0, 0].argmax())
    try:
        found = list(engine.draw(first, Sampler(GREEDY), steps))
    except UserError as error:
        return (Check("ids that the device draws", str(error), f"{steps}", ok=False),)
    chosen = [int(_prefill(engine, ids)[0, 0].argmax())]
    for _ in range(steps):
        chosen.append(int(engine.decode(chosen[-1:])[0].argmax()))
    engine.reset()
    same = sum(a == b for a, b in zip(found, chosen[1:], strict=True))
    return (Check("ids that the device draws", f"{same} of {steps} the likeliest", f"{steps}", same == steps),)


def replay(engine: VerifiableEngine, prompts: Sequence[GoldenPrompt]) -> tuple[Check, ...]:
    """Feed golden prompts and the greedy tokens after them to every text, and compare.

    The engine's caches are emptied before and after.
    """
    bound, batch = bound_of(engine.manifest), engine.batch
    checks: list[Check] = []
    for prompt in prompts:
        engine.reset()
        rows = [prompt.ids.tolist()] * batch
        if engine.manifest.model.generates:
            found = np.stack(
                [engine.prefill(rows), *(engine.decode([token_id] * batch) for token_id in prompt.next_ids.tolist())]
            )
        else:
            found = engine.head_outputs(prompt.ids.tolist())[:, None]
        if (len(found), found.shape[2]) != prompt.outputs.shape:
            shape = list(prompt.outputs.shape)
            raise UserError(
                f"a golden prompt has outputs {shape}, but the model gives {[len(found), found.shape[2]]}; "
                "copy the artifact again"
            )
        expected = np.broadcast_to(prompt.outputs[:, None], found.shape)
        checks.append(
            _close(
                f"golden prompt of {len(prompt.ids)} tokens",
                found,
                expected,
                bound,
                whole=not engine.manifest.model.generates,
            )
        )
        if engine.manifest.model.generates:
            checks.append(_same_tokens(f"greedy tokens after {len(prompt.ids)}", found, expected, bound))
    engine.reset()
    return tuple(checks)


def _same_tokens(name: str, found: Logits, expected: Logits, bound: float) -> Check:
    """Check that the likeliest tokens of logits (steps, B, vocab) are the expected ones.

    Others pass if their expected logits are as large within the bound, by which both sides may be off.
    """
    chosen = found.argmax(-1)
    best = expected.max(-1)
    behind = best - np.take_along_axis(expected, chosen[..., None], -1)[..., 0]
    same = int((chosen == expected.argmax(-1)).sum())
    ok = bool((behind <= 2 * bound * np.abs(expected).max(-1)).all())
    return Check(name, f"{same} of {chosen.size} the same", f"{chosen.size}, or equally likely within the bound", ok)


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


def _close(name: str, found: Logits, expected: Logits, bound: float, *, whole: bool = False) -> Check:
    """Compare each text and step relative to its own largest logit, or with `whole` to the largest of all.

    The latter is for heads: with only one or two outputs, all of a row may be near zero.
    """
    assert found.shape == expected.shape, f"{name}: {found.shape} and {expected.shape}"
    largest = np.full(expected.shape[:-1], np.abs(expected).max()) if whole else np.abs(expected).max(-1)
    difference = float((np.abs(found - expected).max(-1) / np.maximum(largest, np.finfo(np.float32).tiny)).max())
    return Check(name, f"{difference:.1e} relative", f"at most {bound:.1e}", bool(difference <= bound))  # NaN is not


def table(checks: Sequence[Check]) -> str:
    """The checks in aligned columns, under a heading."""
    rows = [
        ("check", "found", "expected", "ok"),
        *((c.check, c.found, c.expected, "yes" if c.ok else "NO") for c in checks),
    ]
    return "\n".join(in_columns(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Verify one artifact; status 0 if every check holds, else 2."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.verify", description="Check that an artifact is intact and computes what it should."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add_public_key(parser)
    add_minimum_build(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    # These load TVM's runtime, which `--help` and wrong flags do not need.
    from runtime.engines.engine import Engine
    from runtime.engines.side_by_side import SideBySide

    key = args.public_key or key_of_environment()
    engine = Engine.open(  # raises for a broken artifact
        args.artifact, threads=args.threads, public_key=key, minimum_build=args.minimum_build
    )
    manifest = engine.manifest
    n_files = len(manifest.files) + 1
    checks = [Check("files", f"{n_files} sound", f"{n_files} sound", True)]
    if key is not None:
        checks.append(Check("signature", f"by the owner of {key}", f"by the owner of {key}", True))
    texts = SideBySide(engine, engine.slots)
    if manifest.model.generates:
        checks += [*verify(texts), *verify_draws(SideBySide(engine, 1))]
    if manifest.golden is not None:
        checks += replay(texts, read_golden(args.artifact / manifest.golden))
    elif not manifest.model.generates:
        raise UserError(
            f"{args.artifact} has the head {manifest.model.head} and no golden prompts to compare with; "
            "`make ship` adds them"
        )
    ok = all(check.ok for check in checks)
    print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}) if args.json else table(checks))
    if not ok:
        failed = "; ".join(f"{c.check}: {c.found}, expected {c.expected}" for c in checks if not c.ok)
        raise UserError(f"{args.artifact} does not compute what it should on this machine ({failed}); compile it again")
    return 0


if __name__ == "__main__":
    run_command(main)
