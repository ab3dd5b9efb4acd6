"""Generation: a stream of steps from any model that can prefill and decode, and the command that prints it."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import cli, outcome
from runtime.errors import INTERRUPTED_STATUS, UserError, run_command
from runtime.sampler import Sampler, top_logprobs
from runtime.stream import FinishReason, Step, TextStream, with_text
from runtime.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from runtime.engine import Engine

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
    for count in range(1, max_tokens + 1):
        token_id = sampler.sample(logits, history)
        history.append(token_id)
        full = count == max_tokens or model.room() == 0
        reason: FinishReason | None = "stop" if token_id in eos_ids else "length" if full else None
        yield Step(token_id, None if logprobs is None else tuple(top_logprobs(logits, logprobs)), reason)
        if reason is not None:
            return
        logits = model.decode([token_id])[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Generate once, as `python -m runtime.generate --help` tells."""
    args = _parser().parse_args(argv)
    _check_flags(args)
    sampler = Sampler(cli.sampling_options(args))
    start = time.perf_counter()
    engine = cli.open_engine(args.artifact, args.threads)
    spec = engine.manifest.tokenizer
    tokenizer = None if spec is None else open_tokenizer(spec, engine.folder)
    load_s = time.perf_counter() - start
    prompt_ids = _prompt_ids(args, engine, tokenizer)
    steps = generate(engine, prompt_ids, sampler, max_tokens=args.max_tokens, eos_ids=spec.eos_ids if spec else (), logprobs=args.logprobs)
    if tokenizer is not None:  # a reply in a chat begins a text, a continuation goes on with one
        steps = with_text(steps, TextStream(tokenizer.stream(after=() if args.chat else prompt_ids), args.stop))
    elif args.stop:
        raise UserError(f"--stop needs a tokenizer, and {args.artifact} has none: leave the flag out")
    return _show(args, steps, len(prompt_ids), load_s, has_text=tokenizer is not None)


def _parser() -> argparse.ArgumentParser:
    parser = cli.model_parser("runtime.generate", "Generate text from a compiled artifact.", max_tokens=DEFAULT_MAX_TOKENS)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue, or to answer with --chat")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids to continue, as they are")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message in front, with --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a stream of text")
    parser.add_argument("--logprobs", type=int, metavar="K", help="add the K likeliest tokens of each step, with --json")
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    if args.chat and args.prompt is None:
        raise UserError("--chat wraps a text and --prompt-ids gives token ids: pass --prompt, or leave --chat out")
    if args.system is not None and not args.chat:
        raise UserError("--system is part of a chat: pass --chat with it")
    if args.logprobs is not None and not args.json:
        raise UserError("--logprobs is printed with --json alone: pass both")
    if args.logprobs is not None and args.logprobs < 1:
        raise UserError(f"--logprobs is {args.logprobs}, expected at least 1")


def _prompt_ids(args: argparse.Namespace, engine: "Engine", tokenizer: Tokenizer | None) -> list[int]:
    if args.prompt is None:
        return _parse_ids(args.prompt_ids)
    if tokenizer is None:
        raise UserError(f"--prompt needs a tokenizer, and {args.artifact} has none: pass --prompt-ids")
    if not args.chat:
        return tokenizer.encode(args.prompt)
    from runtime.chat_template import Message, chat_ids, open_chat_template  # loads Jinja, which only a chat needs

    system = [] if args.system is None else [Message(role="system", content=args.system)]
    template = open_chat_template(tokenizer.spec, engine.folder, tokenizer)
    return chat_ids(template, tokenizer, [*system, Message(role="user", content=args.prompt)])


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--prompt-ids is {text!r}, expected whole numbers with commas between them, such as 1,2,3") from error


def _show(args: argparse.Namespace, steps: Iterator[Step], prompt_tokens: int, load_s: float, *, has_text: bool) -> int:
    if args.json:
        result = outcome.collect(steps, prompt_tokens, load_s, show=lambda _step: None)
        print(json.dumps(outcome.as_json(result, has_text=has_text)))
    else:
        result = outcome.collect(steps, prompt_tokens, load_s, show=lambda step: cli.write(step.text if has_text else f"{step.token_id} "))
        print(flush=True)
        print(cli.dim(outcome.summary(result), sys.stderr), file=sys.stderr)
    return INTERRUPTED_STATUS if result.finish_reason == "interrupted" else 0


if __name__ == "__main__":
    run_command(main)
