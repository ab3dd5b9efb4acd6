"""Code that the commands share: sampling flags, opening an artifact, writing to a terminal."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from runtime.artifact.build_number import add_minimum_build
from runtime.artifact.manifest import HEADS, HeadName
from runtime.decoding.options import SamplingOptions
from runtime.errors import UserError
from runtime.scheduling.settings import SchedulerSettings

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
    parser.add_argument(
        "--presence-penalty",
        type=float,
        metavar="P",
        help="-2 to 2; above 0 makes tokens that have been generated less likely",
    )
    parser.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="P",
        help="-2 to 2; above 0 makes tokens less likely each time that they are generated",
    )
    parser.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID:BIAS",
        help="add BIAS, -100 to 100, to the logit of the token ID; may be given several times",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same tokens")
    parser.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="guess what follows from the text so far and check the guesses in one step, which changes no token "
        "(default: where that holds to the last bit, which is on a CPU)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add_minimum_build(parser)
    return parser


def scheduler_settings(args: argparse.Namespace, engine: "Engine") -> SchedulerSettings:
    """The flags of `model_parser` that say how steps are made; raises `UserError` if the engine cannot follow them."""
    if args.speculate and len(engine.step_rows) == 1:
        raise UserError(
            f"--speculate checks guesses in steps of several rows, but {args.artifact} has only steps of one: "
            "compile with shape.step_rows: [1, 2, 4], or leave the flag out"
        )
    # a conversation goes on from its own tokens, whichever function has computed them
    return SchedulerSettings(speculate=args.speculate, reuse="full")


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """The sampling flags of `model_parser`, checked; raises `UserError` for values out of range."""
    return SamplingOptions(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=dict(map(_bias, args.logit_bias)) or None,
    )


def _bias(given: str) -> tuple[int, float]:
    token_id, _, bias = given.partition(":")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise UserError(f"--logit-bias is {given}, expected a token id and a number, such as 42:-5") from None


def open_engine(
    artifact: Path, threads: int | None, minimum_build: int = 0, heads: Sequence[HeadName] = ("causal_lm",)
) -> "Engine":
    """Open an artifact.

    Raises `UserError` for one that fails a check, or whose head is not one of the `heads` that the command uses.
    """
    from runtime.engines.engine import Engine  # loads TVM's runtime, which `--help` and wrong flags do not need

    engine = Engine.open(artifact, threads=threads, minimum_build=minimum_build)
    head = engine.manifest.model.head
    if head not in heads:
        raise UserError(
            f"{artifact} has the head {head}, which this command does not use; run `python -m {HEADS[head].command}`"
        )
    return engine


class InOrder:
    """Writes texts that arrive interleaved one after the other.

    The first text that has not ended is written as it arrives; later ones wait until the texts before them have ended.
    """

    def __init__(self, headings: Sequence[str], write: Callable[[str], None], *, ending: str = "\n") -> None:
        self._waiting = list(headings)
        self._ended = [False] * len(headings)
        self._current = 0
        self._write = write
        self._ending = ending

    def push(self, index: int, text: str, *, ended: bool) -> None:
        """Add more of one text; `ended` says whether that completes it."""
        self._waiting[index] += text
        self._ended[index] = ended
        self._write_what_can_be()

    def finish(self) -> None:
        """Write whatever still waits; call it once, at the end."""
        self._ended = [True] * len(self._ended)
        self._write_what_can_be()

    def _write_what_can_be(self) -> None:
        while self._current < len(self._waiting):
            ended = self._ended[self._current]
            self._write(self._waiting[self._current] + (self._ending if ended else ""))
            self._waiting[self._current] = ""
            if not ended:
                return
            self._current += 1


def write(text: str) -> None:
    """Write text to stdout and flush it, with question marks for characters that its encoding lacks."""
    encoding = sys.stdout.encoding
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def dim(text: str, stream: TextIO) -> str:
    """The text in the terminal's faint type if `stream` is a terminal."""
    return f"\x1b[2m{text}\x1b[0m" if stream.isatty() else text
