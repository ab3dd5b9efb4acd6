"""`python -m runtime.chat ARTIFACT`: a conversation at the terminal."""

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from runtime import cli
from runtime.errors import UserError, run_command
from runtime.scheduling.conversation import Conversation
from runtime.text.conversation_encoder import open_conversation_encoder
from runtime.text.replies import ReplyText
from runtime.text.stream import Step
from runtime.text.tokenizer import open_tokenizer

DEFAULT_MAX_TOKENS = 1024
BYTE_ORDER_MARK = "\ufeff"  # begins some files that are read in place of a terminal


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Let Ctrl-C set the event instead of raising, so that no decode step is cut short and the caches stay known."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda _number, _frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def show_reply(conversation: Conversation, text: str, write: Callable[[str], None]) -> None:
    """Write one reply as it is generated, then a remark if it did not end by itself.

    Ctrl-C ends it: immediately during prefill, otherwise after the current step.
    """
    shown = ReplyText(conversation.dividers, partial(cli.dim, stream=sys.stdout))
    remark = ""
    step: Step | None = None
    try:
        with contextlib.closing(conversation.say(text)) as steps:
            step = next(steps)
            write(shown.push(step))
            with deferred_interrupt() as interrupted:
                while step.finish_reason is None and not interrupted.is_set():
                    step = next(steps)
                    write(shown.push(step))
            remark = conversation.remark(step)
    except KeyboardInterrupt:
        remark = "interrupted before the reply began: the message is dropped" if step is None else "interrupted"
    except UserError as error:
        remark = str(error)
    write("\n" + (f"[{remark}]\n" if remark else ""))


def converse(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answer line by line until the input ends or says /exit; /reset starts over."""
    while True:
        try:
            line = read().removeprefix(BYTE_ORDER_MARK).strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            write("[the conversation starts over]\n")
        elif line:
            show_reply(conversation, line, write)


def main(argv: Sequence[str] | None = None) -> int:
    """Chat at the terminal, as `python -m runtime.chat --help` describes."""
    parser = cli.model_parser(
        "runtime.chat",
        "Chat with a compiled artifact. /reset starts over, /exit or Ctrl-D ends the chat, Ctrl-C stops a reply.",
        max_tokens=DEFAULT_MAX_TOKENS,
    )
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    args = parser.parse_args(argv)
    options = cli.sampling_options(args)
    engine = cli.open_engine(args.artifact, args.threads, args.minimum_build)
    options.check_vocabulary(engine.manifest.model.vocab_size)
    spec = engine.manifest.tokenizer
    if spec is None:
        raise UserError(
            f"a chat needs a tokenizer, but {args.artifact} has none: compile from a checkpoint that has one"
        )
    tokenizer = open_tokenizer(spec, engine.folder)
    encoder = open_conversation_encoder(spec, engine.folder, tokenizer)
    conversation = Conversation(
        engine,
        tokenizer,
        encoder,
        options,
        max_tokens=args.max_tokens,
        system=args.system,
        settings=cli.scheduler_settings(args, engine),
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 is refused with its message
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  # gives input() line editing and history
    print(cli.dim("/reset starts over, /exit or Ctrl-D ends the chat, Ctrl-C stops a reply", sys.stdout))
    converse(conversation, lambda: input("> "), cli.write)
    return 0


if __name__ == "__main__":
    run_command(main)
