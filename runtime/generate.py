"""`python -m runtime.generate ARTIFACT --prompt TEXT`: continue prompts, or answer them with --chat."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from runtime import cli, prompts
from runtime.decoding import outcomes
from runtime.decoding.outcomes import Outcome
from runtime.errors import INTERRUPTED_STATUS, UserError, run_command
from runtime.scheduling.completions import completions
from runtime.text.replies import ReplyText, ends_in_thought, read_reply
from runtime.text.stream import Step
from runtime.text.tokenizer import Tokenizer, open_tokenizer

DEFAULT_MAX_TOKENS = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Generate for each prompt, as `python -m runtime.generate --help` describes."""
    args = _parser().parse_args(argv)
    _check_flags(args)
    texts = _texts(args)
    options = cli.sampling_options(args)
    start = time.perf_counter()
    engine = cli.open_engine(args.artifact, args.threads, args.minimum_build)
    options.check_vocabulary(engine.manifest.model.vocab_size)
    spec = engine.manifest.tokenizer
    tokenizer = None if spec is None else open_tokenizer(spec, engine.folder)
    load_s = time.perf_counter() - start
    given = [prompts.prompt_ids(args, text, engine, tokenizer) for text in texts]
    if tokenizer is None and args.stop:
        raise UserError(f"--stop needs a tokenizer, but {args.artifact} has none: leave the flag out")
    steps = completions(
        engine,
        given,
        options,
        max_tokens=args.max_tokens,
        eos_ids=spec.eos_ids if spec else (),
        logprobs=args.logprobs,
        # a chat reply begins a new text, a continuation extends its prompt
        texts=[tokenizer.text_stream(args.stop, after=() if args.chat else ids) for ids in given] if tokenizer else (),
        settings=cli.scheduler_settings(args, engine),
    )
    collect = partial(outcomes.collect, steps, [len(ids) for ids in given], load_s, slots=engine.slots)
    if args.json:
        collected = _print_json(args, collect, given, tokenizer)
    else:
        collected = _print_texts(texts, collect, [_shown(ids, tokenizer) for ids in given])
    return INTERRUPTED_STATUS if any(each.finish_reason == "interrupted" for each in collected) else 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.model_parser(
        "runtime.generate", "Generate text from a compiled artifact.", max_tokens=DEFAULT_MAX_TOKENS
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue, or to answer with --chat; may be given several times. Without --chat it means what the "
        "tokenizer's own file says: names of special tokens are plain text, but names of other added tokens, such as "
        "<|im_end|> in some checkpoints, become those tokens. With --chat, none of them does",
    )
    prompt.add_argument(
        "--prompts-file",
        type=Path,
        metavar="PATH",
        help="a text file with one prompt per line; empty lines are skipped",
    )
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids to continue, as they are")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text, or before the special token of this name; may be given several times",
    )
    prompts.add_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, or a list of them for several prompts"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="add the K likeliest tokens of each step, with --json"
    )
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    prompts.check_flags(args)
    if args.logprobs is not None and not args.json:
        raise UserError("--logprobs is printed only with --json: pass both")
    if args.logprobs is not None and args.logprobs < 1:
        raise UserError(f"--logprobs is {args.logprobs}, expected at least 1")


def _texts(args: argparse.Namespace) -> list[str | None]:
    """The prompts; None if --prompt-ids gives the ids instead."""
    if args.prompts_file is None:
        return args.prompt or [None]
    try:
        lines = args.prompts_file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{args.prompts_file} cannot be read as text: {error}; name a UTF-8 file with one prompt per line"
        ) from error
    given = [line.removesuffix("\r") for line in lines if line.strip()]
    if not given:
        raise UserError(f"{args.prompts_file} holds no prompt, expected one per line")
    return given


def _print_json(
    args: argparse.Namespace,
    collect: Callable[..., list[Outcome]],
    given: Sequence[Sequence[int]],
    tokenizer: Tokenizer | None,
) -> list[Outcome]:
    """Print one object if --prompt or --prompt-ids was given once, otherwise a list in the order of the prompts."""
    collected = collect(show=lambda _index, _step: None)
    replies = [
        read_reply(each.steps, tokenizer, in_thought=ends_in_thought(ids, tokenizer)) if tokenizer else None
        for each, ids in zip(collected, given, strict=True)
    ]
    objects = [outcomes.as_json(each, reply) for each, reply in zip(collected, replies, strict=True)]
    print(json.dumps(objects[0] if len(objects) == 1 and args.prompts_file is None else objects))
    return collected


def _shown(ids: Sequence[int], tokenizer: Tokenizer | None) -> Callable[[Step], str]:
    """How the steps behind a prompt are written: their texts or, without a tokenizer, their ids."""
    if tokenizer is None:
        return lambda step: f"{step.token_id} "
    faint = partial(cli.dim, stream=sys.stdout)
    return ReplyText(tokenizer.dividers, faint, in_thought=ends_in_thought(ids, tokenizer)).push


def _print_texts(
    texts: Sequence[str | None], collect: Callable[..., list[Outcome]], shown: Sequence[Callable[[Step], str]]
) -> list[Outcome]:
    """Write each text as it is generated, in the form in which its function in `shown` gives a step.

    Several texts get headings; those that run beside the first are written once it has ended.
    """
    several = len(texts) > 1
    pages = cli.InOrder([_heading(text, first=i == 0) if several else "" for i, text in enumerate(texts)], cli.write)
    collected = collect(
        show=lambda i, step: pages.push(i, shown[i](step), ended=step.finish_reason is not None),
    )
    pages.finish()
    for number, each in enumerate(collected, 1):
        label = f"prompt {number}: " if several else ""
        print(cli.dim(label + outcomes.summary(each), sys.stderr), file=sys.stderr)
    return collected


def _heading(text: str | None, *, first: bool) -> str:
    """A heading of one line, whatever the prompt contains."""
    return ("" if first else "\n") + f"> {' '.join((text or '').split())}\n"


if __name__ == "__main__":
    run_command(main)
