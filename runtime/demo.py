"""`python -m runtime.demo ARTIFACT`: a base model continues three prompts, or with --interactive those that you type.

The prompts and the length are those of the `demo` command in Mistral's reference repository; no chat template is used.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime import cli
from runtime.artifact.build_number import add_minimum_build
from runtime.decoding.options import GREEDY
from runtime.engines.slot_model import SlotModel
from runtime.errors import UserError, run_command
from runtime.scheduling.completions import completions
from runtime.text.stream import Step, TextStream
from runtime.text.tokenizer import Tokenizer, open_tokenizer

DEFAULT_MAX_TOKENS = 35
PROMPTS = ("This is a test", "This is another great test", "This is a third test, mistral AI is very good at testing. ")
RULE = "\n=====\n"


def continuations(
    model: SlotModel, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int
) -> Iterator[tuple[int, Step]]:
    """Steps of each text's greedy continuation, with the index of the text."""
    prompts = [tokenizer.encode(text) for text in texts]
    return completions(
        model,
        prompts,
        GREEDY,
        max_tokens=max_tokens,
        eos_ids=tokenizer.spec.eos_ids,
        texts=[TextStream(tokenizer.stream(after=ids)) for ids in prompts],
    )


def show(model: SlotModel, tokenizer: Tokenizer, max_tokens: int, write: Callable[[str], None]) -> None:
    """Write each of `PROMPTS` with its continuation, side by side if the model has enough slots."""
    pages = cli.InOrder(PROMPTS, write, ending=RULE)
    for index, step in continuations(model, tokenizer, PROMPTS, max_tokens):
        pages.push(index, step.text, ended=step.finish_reason is not None)


def converse(
    model: SlotModel, tokenizer: Tokenizer, max_tokens: int, read: Callable[[], str], write: Callable[[str], None]
) -> None:
    """Continue each line on its own until the input ends.

    Ctrl-C ends a continuation; if a line cannot be continued, the reason is written.
    """
    while True:
        remark = ""
        try:
            text = read()
            if not text.strip():
                continue
            write(text)
            for _index, step in continuations(model, tokenizer, [text], max_tokens):
                write(step.text)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            remark = "\n[interrupted]"
        except UserError as error:
            remark = f"\n[{error}]"
        write(remark + RULE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration, as `python -m runtime.demo --help` describes."""
    args = _parser().parse_args(argv)
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens is {args.max_tokens}, expected at least 1")
    engine = cli.open_engine(args.artifact, args.threads, args.minimum_build)
    spec = engine.manifest.tokenizer
    if spec is None:
        raise UserError(
            f"the demo needs a tokenizer, but {args.artifact} has none: compile from a checkpoint that has one"
        )
    tokenizer = open_tokenizer(spec, engine.folder)
    if not args.interactive:
        show(engine, tokenizer, args.max_tokens, cli.write)
        return 0
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  # gives input() line editing and history
    print(cli.dim("each prompt is continued on its own; Ctrl-D ends the demo, Ctrl-C stops a continuation", sys.stdout))
    converse(engine, tokenizer, args.max_tokens, lambda: input("Prompt: "), cli.write)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.demo", description="Let a base model continue three prompts, or those that you type."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument(
        "--interactive", action="store_true", help="continue prompts typed at the terminal; Ctrl-D ends the demo"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="tokens of each continuation (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add_minimum_build(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
