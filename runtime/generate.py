"""Generation: a stream of steps from any model that can prefill and decode, and the command that prints it."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import cli
from runtime.decoding import outcome
from runtime.decoding.batch import BatchModel, check_prompts, finish_reason_of, generate_batch, next_step, row_samplers
from runtime.decoding.outcome import Outcome
from runtime.decoding.sampler import DrawingModel, Sampler
from runtime.errors import INTERRUPTED_STATUS, UserError, run_command
from runtime.text.stream import Step, TextStream, with_text
from runtime.text.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from runtime.engines.engine import Engine

DEFAULT_MAX_TOKENS = 128


class TokenModel(Protocol):
    """What generation needs of a model that keeps the caches of one sequence."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append one list of ids per row; logits (1, vocab) after the last id."""

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id per row; logits (1, vocab)."""

    def room(self) -> int | None:
        """How many more ids the caches take; None without a limit."""

    def reset(self) -> None:
        """Forget every id."""


def generate(
    model: TokenModel,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    logprobs: int | None = None,
    fed: Sequence[int] = (),
) -> Iterator[Step]:
    """Feed the prompt and yield ids until an end of sequence (which is the last step), `max_tokens` or full caches.

    `fed` are the ids that the caches hold already. An id enters the caches when the step after it is asked for: whoever leaves early leaves
    all ids but the last one in the caches. Raises `UserError` when the prompt is empty or does not fit.
    """
    if not prompt_ids:
        raise UserError("the prompt has no tokens, expected at least one; pass some text")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}, expected at least 1")
    history = [*fed, *prompt_ids]
    logits = model.prefill([prompt_ids])[0]
    room = model.room()
    most = max_tokens if room is None else min(max_tokens, room + 1)
    if logprobs is None and isinstance(model, DrawingModel) and model.can_draw(sampler.options):
        first = sampler.sample(logits, history)
        yield from _ended(itertools.chain([first], model.draw(first, sampler, most - 1)), most, eos_ids)
        return
    for left in range(most, 0, -1):
        step = next_step(logits, sampler, history, left=left, eos_ids=eos_ids, logprobs=logprobs)
        yield step
        if step.finish_reason is not None:
            return
        logits = model.decode([step.token_id])[0]


def _ended(ids: Iterator[int], most: int, eos_ids: Sequence[int]) -> Iterator[Step]:
    """At most `most` ids as steps, up to an end of sequence."""
    for left, token_id in zip(range(most, 0, -1), ids, strict=False):
        step = Step(token_id, finish_reason=finish_reason_of(token_id, left, eos_ids))
        yield step
        if step.finish_reason is not None:
            return


class AnyModel(TokenModel, BatchModel, Protocol):
    """A model of any batch."""


def generate_all(
    model: AnyModel,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    logprobs: int | None = None,
    texts: Sequence[TextStream] = (),
) -> Iterator[tuple[int, Step]]:
    """`generate_batch` for a model of any batch: one of batch 1 takes the prompts one after the other."""
    if model.batch > 1:
        yield from generate_batch(
            model, prompts, samplers, max_tokens=max_tokens, eos_ids=eos_ids, logprobs=logprobs, texts=texts
        )
        return
    model.reset()
    check_prompts(prompts, max_tokens, model.room())
    for i, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True)):
        model.reset()
        steps = generate(model, prompt, sampler, max_tokens=max_tokens, eos_ids=eos_ids, logprobs=logprobs)
        yield from ((i, step) for step in (with_text(steps, texts[i]) if texts else steps))


def main(argv: Sequence[str] | None = None) -> int:
    """Generate for each prompt, as `python -m runtime.generate --help` tells."""
    args = _parser().parse_args(argv)
    _check_flags(args)
    texts = _texts(args)
    samplers = row_samplers(cli.sampling_options(args), len(texts))
    start = time.perf_counter()
    engine = cli.open_batch_engine(args.artifact, args.threads)
    spec = engine.manifest.tokenizer
    tokenizer = None if spec is None else open_tokenizer(spec, engine.folder)
    load_s = time.perf_counter() - start
    prompts = [_prompt_ids(args, text, engine, tokenizer) for text in texts]
    if tokenizer is None and args.stop:
        raise UserError(f"--stop needs a tokenizer, and {args.artifact} has none: leave the flag out")
    steps = generate_all(
        engine,
        prompts,
        samplers,
        max_tokens=args.max_tokens,
        eos_ids=spec.eos_ids if spec else (),
        logprobs=args.logprobs,
        # a reply in a chat begins a text, a continuation goes on with one
        texts=[TextStream(tokenizer.stream(after=() if args.chat else ids), args.stop) for ids in prompts]
        if tokenizer
        else (),
    )
    has_text = tokenizer is not None
    collect = partial(outcome.collect, steps, [len(ids) for ids in prompts], load_s, batch=engine.batch)
    outcomes = (
        _print_json(args, collect, has_text=has_text) if args.json else _print_texts(texts, collect, has_text=has_text)
    )
    return INTERRUPTED_STATUS if any(each.finish_reason == "interrupted" for each in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.model_parser(
        "runtime.generate", "Generate text from a compiled artifact.", max_tokens=DEFAULT_MAX_TOKENS
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue, or to answer with --chat; may be given several times",
    )
    prompt.add_argument(
        "--prompts-file", type=Path, metavar="PATH", help="a text file with one prompt a line; empty lines are left out"
    )
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids to continue, as they are")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message in front, with --chat")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, or a list of them for several prompts"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="add the K likeliest tokens of each step, with --json"
    )
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    if args.chat and args.prompt_ids is not None:
        raise UserError("--chat wraps a text and --prompt-ids gives token ids: pass --prompt, or leave --chat out")
    if args.system is not None and not args.chat:
        raise UserError("--system is part of a chat: pass --chat with it")
    if args.logprobs is not None and not args.json:
        raise UserError("--logprobs is printed with --json alone: pass both")
    if args.logprobs is not None and args.logprobs < 1:
        raise UserError(f"--logprobs is {args.logprobs}, expected at least 1")


def _texts(args: argparse.Namespace) -> list[str | None]:
    """The prompts; None where --prompt-ids gives the ids instead."""
    if args.prompts_file is None:
        return args.prompt or [None]
    try:
        lines = args.prompts_file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{args.prompts_file} does not read as text: {error}; name a UTF-8 file with one prompt a line"
        ) from error
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{args.prompts_file} holds no prompt, expected one a line")
    return prompts


def _prompt_ids(args: argparse.Namespace, text: str | None, engine: "Engine", tokenizer: Tokenizer | None) -> list[int]:
    if text is None:
        return _parse_ids(args.prompt_ids)
    if tokenizer is None:
        raise UserError(f"--prompt needs a tokenizer, and {args.artifact} has none: pass --prompt-ids")
    if not args.chat:
        return tokenizer.encode(text)
    from runtime.text.conversation import open_conversation_encoder  # loads Jinja, which only a chat needs
    from runtime.text.messages import Message

    system = [] if args.system is None else [Message(role="system", content=args.system)]
    encoder = open_conversation_encoder(tokenizer.spec, engine.folder, tokenizer)
    return encoder.encode([*system, Message(role="user", content=text)])


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--prompt-ids is {text!r}, expected whole numbers with commas between them, such as 1,2,3"
        ) from error


def _print_json(args: argparse.Namespace, collect: Callable[..., list[Outcome]], *, has_text: bool) -> list[Outcome]:
    """One object for --prompt or --prompt-ids given once, else a list of them in the order of the prompts."""
    outcomes = collect(show=lambda _index, _step: None)
    objects = [outcome.as_json(each, has_text=has_text) for each in outcomes]
    print(json.dumps(objects[0] if len(objects) == 1 and args.prompts_file is None else objects))
    return outcomes


def _print_texts(
    texts: Sequence[str | None], collect: Callable[..., list[Outcome]], *, has_text: bool
) -> list[Outcome]:
    """Each text as it comes; several are under headings, and those that run beside the first follow when it has ended."""
    several = len(texts) > 1
    pages = cli.InOrder([_heading(text, first=i == 0) if several else "" for i, text in enumerate(texts)], cli.write)
    outcomes = collect(
        show=lambda i, step: pages.push(
            i, step.text if has_text else f"{step.token_id} ", ended=step.finish_reason is not None
        ),
    )
    pages.finish()
    for number, each in enumerate(outcomes, 1):
        label = f"prompt {number}: " if several else ""
        print(cli.dim(label + outcome.summary(each), sys.stderr), file=sys.stderr)
    return outcomes


def _heading(text: str | None, *, first: bool) -> str:
    """One line, whatever the prompt holds."""
    return ("" if first else "\n") + f"> {' '.join((text or '').split())}\n"


if __name__ == "__main__":
    run_command(main)
