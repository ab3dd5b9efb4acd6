"""The measurements of `python -m runtime.bench` that need slots: their flags, and what each does to an engine."""

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.benchmarks.second_turn import SecondTurnReport, SecondTurnWorkload, measure_second_turn
from runtime.benchmarks.sequences import SequencesReport, SequencesWorkload, SlotSequences, measure_sequences
from runtime.benchmarks.speculation import SpeculationReport, measure_speculation, speculation_tasks
from runtime.errors import UserError

if TYPE_CHECKING:
    from runtime.engines.engine import Engine

CONVERSATION = 512  # tokens before a second turn


Report = SequencesReport | SecondTurnReport | SpeculationReport


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of which one may be given; that measurement then takes the place of the usual one."""
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--sequences", metavar="N,N", help="measure so many sequences side by side, at each context, and nothing else"
    )
    parts.add_argument(
        "--second-turn",
        metavar="N,N",
        help=f"measure the time to the first token of N new tokens behind a conversation of {CONVERSATION}, and "
        "nothing else",
    )
    parts.add_argument(
        "--speculation", action="store_true", help="measure what guessing tokens gains on two texts, and nothing else"
    )


def chosen_part(
    args: argparse.Namespace, contexts: tuple[int, ...], counts: Callable[[str], tuple[int, ...]]
) -> "Callable[[Engine], Report] | None":
    """The measurement that the flags ask for; None if they ask for none. `counts` parses a list of numbers."""
    if args.sequences is not None:
        workload = SequencesWorkload(counts(args.sequences), contexts, args.tokens, args.repeats)
        return lambda engine: _sequences(engine, workload)
    if args.second_turn is not None:
        turns = SecondTurnWorkload(CONVERSATION, counts(args.second_turn), args.repeats)
        return lambda engine: _second_turn(engine, turns)
    if args.speculation:
        return lambda engine: _speculation(engine, args.repeats)
    return None


def _sequences(engine: "Engine", workload: SequencesWorkload) -> SequencesReport:
    return measure_sequences(SlotSequences(engine), engine.manifest.model.vocab_size, workload)


def _second_turn(engine: "Engine", workload: SecondTurnWorkload) -> SecondTurnReport:
    return measure_second_turn(engine, engine.manifest.model.vocab_size, workload, time.perf_counter)


def _speculation(engine: "Engine", repeats: int) -> SpeculationReport:
    spec = engine.manifest.tokenizer
    if spec is None:
        raise UserError(f"--speculation needs a tokenizer, but {engine.folder} has none: leave the flag out")
    # a box that only checks a GPU has no packages for text
    from runtime.text.conversation_encoder import open_conversation_encoder
    from runtime.text.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(spec, engine.folder)
    tasks = speculation_tasks(tokenizer, open_conversation_encoder(spec, engine.folder, tokenizer))
    return measure_speculation(engine, tasks, repeats, time.perf_counter)
