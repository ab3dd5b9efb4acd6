"""What the commands that generate text share: sampling flags, opening an artifact, writing to a terminal."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from runtime.artifact.manifest import HEADS, HeadName
from runtime.decoding.sampler import SamplingOptions
from runtime.errors import UserError

if TYPE_CHECKING:
    from runtime.engines.engine import Engine


def model_parser(command: str, description: str, *, max_tokens: int) -> argparse.ArgumentParser:
    """A parser with the artifact and every flag of generation; `max_tokens` is the command's default."""
    defaults = SamplingOptions()
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help="generate at most N tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0 is greedy (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P of the probability"
    )
    parser.add_argument("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1 makes tokens that have occurred less likely"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same tokens")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    return parser


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """The sampling flags of `model_parser`, checked; raises `UserError` out of range."""
    return SamplingOptions(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)


def open_engine(artifact: Path, threads: int | None) -> "Engine":
    """Open an artifact of batch 1; raises `UserError` for any other and for an artifact that does not check out."""
    engine = open_batch_engine(artifact, threads)
    if engine.batch != 1:
        raise UserError(
            f"{artifact} is compiled for {engine.batch} sequences at once, expected 1: set shape.batch: 1 in its yaml and compile again"
        )
    return engine


def open_batch_engine(artifact: Path, threads: int | None, heads: Sequence[HeadName] = ("causal_lm",)) -> "Engine":
    """Open an artifact of any batch; raises `UserError` for one that does not check out, or has none of the `heads` that the command uses."""
    from runtime.engines.engine import Engine  # loads TVM's runtime, which `--help` and a wrong flag need not wait for

    engine = Engine.open(artifact, threads=threads)
    head = engine.manifest.model.head
    if head not in heads:
        raise UserError(
            f"{artifact} has the head {head}, which this command does not use; run `python -m {HEADS[head].command}`"
        )
    return engine


class InOrder:
    """Writes texts that come interleaved one after the other: the first that has not ended as it comes, later ones when it is their turn."""

    def __init__(self, headings: Sequence[str], write: Callable[[str], None], *, ending: str = "\n") -> None:
        self._waiting = list(headings)
        self._ended = [False] * len(headings)
        self._turn = 0
        self._write = write
        self._ending = ending

    def push(self, index: int, text: str, *, ended: bool) -> None:
        """More of one text, and whether that was all of it."""
        self._waiting[index] += text
        self._ended[index] = ended
        self._write_what_can_be()

    def finish(self) -> None:
        """Write whatever still waits; call it once, at the end."""
        self._ended = [True] * len(self._ended)
        self._write_what_can_be()

    def _write_what_can_be(self) -> None:
        while self._turn < len(self._waiting):
            ended = self._ended[self._turn]
            self._write(self._waiting[self._turn] + (self._ending if ended else ""))
            self._waiting[self._turn] = ""
            if not ended:
                return
            self._turn += 1


def write(text: str) -> None:
    """Text to stdout at once, with question marks for what its encoding lacks."""
    encoding = sys.stdout.encoding
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def dim(text: str, stream: TextIO) -> str:
    """The text in the terminal's faint type when `stream` is a terminal."""
    return f"\x1b[2m{text}\x1b[0m" if stream.isatty() else text
