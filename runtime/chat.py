"""A conversation at the terminal that keeps the caches between turns, so that each turn feeds only what is new."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence

from runtime import cli
from runtime.decoding.sampler import Sampler
from runtime.errors import UserError, run_command
from runtime.generate import TokenModel, generate
from runtime.text.conversation import ConversationEncoder, open_conversation_encoder
from runtime.text.messages import Message
from runtime.text.stream import Step, TextStream, with_text
from runtime.text.tokenizer import Tokenizer, open_tokenizer

DEFAULT_MAX_TOKENS = 1024


class Conversation:
    """The messages so far and the ids that the model's caches hold."""

    def __init__(
        self,
        model: TokenModel,
        tokenizer: Tokenizer,
        encoder: ConversationEncoder,
        sampler: Sampler,
        *,
        max_tokens: int,
        system: str | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._system = [] if system is None else [Message(role="system", content=system)]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = list(self._system)
        self._cached: list[int] | None = None  # None: unknown, so the caches must be emptied before use

    def say(self, text: str) -> Generator[Step, None, None]:
        """The steps of the reply. Whoever closes the iterator early cuts the reply short there.

        Raises `UserError` when the model cannot be given the conversation or the conversation does not fit; it then stays as it was.
        """
        messages = [*self._messages, Message(role="user", content=text)]
        ids = self._encoder.encode(messages)
        cached = self._reuse(ids)
        self._check_room(len(ids) - len(cached))
        steps = generate(
            self._model,
            ids[len(cached) :],
            self._sampler,
            max_tokens=self._max_tokens,
            eos_ids=self._tokenizer.spec.eos_ids,
            fed=cached,
        )
        reply: list[str] = []
        generated: list[int] = []
        self._cached = None  # while the model runs, an interrupt leaves the caches in an unknown state
        try:
            for step in with_text(steps, TextStream(self._tokenizer.stream())):
                reply.append(step.text)
                generated.append(step.token_id)
                self._cached = ids + generated[:-1]
                yield step
                if step.finish_reason is None:
                    self._cached = None
        finally:
            if generated:
                self._messages = [*messages, Message(role="assistant", content="".join(reply))]

    def remark(self, last: Step) -> str:
        """Why a reply ended with this step, in one sentence; empty when the model ended it by itself."""
        if last.finish_reason == "stop":
            return ""
        if last.finish_reason is None:
            return "interrupted"
        if self._model.room() == 0:
            return "the cache is full: type /reset to start anew, or compile with a larger shape.cache_len"
        return f"the reply has reached {self._max_tokens} tokens, the limit that --max-tokens sets"

    def _reuse(self, ids: list[int]) -> list[int]:
        """The ids in the caches if `ids` go on from them; else none, with the caches emptied."""
        cached = self._cached
        if cached is not None and len(cached) < len(ids) and ids[: len(cached)] == cached:
            return cached
        self._model.reset()
        self._cached = []
        return []

    def _check_room(self, tokens: int) -> None:
        room = self._model.room()
        if room is not None and tokens > room:
            raise UserError(
                f"the next {tokens} tokens of the conversation do not fit, the cache has room for {room}: "
                "type /reset to start anew, or compile with a larger shape.cache_len"
            )


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, so that no decode step is left half done and the caches stay known."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda _number, _frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def show_reply(conversation: Conversation, text: str, write: Callable[[str], None]) -> None:
    """Write one reply as it comes, then a remark if it did not end by itself. Ctrl-C ends it: at once in prefill, else after the step."""
    remark = ""
    step: Step | None = None
    try:
        with contextlib.closing(conversation.say(text)) as steps:
            step = next(steps)
            write(step.text)
            with deferred_interrupt() as interrupted:
                while step.finish_reason is None and not interrupted.is_set():
                    step = next(steps)
                    write(step.text)
            remark = conversation.remark(step)
    except KeyboardInterrupt:
        remark = "interrupted before the reply began: the message is dropped" if step is None else "interrupted"
    except UserError as error:
        remark = str(error)
    write("\n" + (f"[{remark}]\n" if remark else ""))


def converse(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answer line by line until the input ends or says /exit; /reset starts anew."""
    while True:
        try:
            line = read().strip()
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
            write("[the conversation starts anew]\n")
        elif line:
            show_reply(conversation, line, write)


def main(argv: Sequence[str] | None = None) -> int:
    """Chat at the terminal, as `python -m runtime.chat --help` tells."""
    parser = cli.model_parser(
        "runtime.chat",
        "Chat with a compiled artifact. /reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops a reply.",
        max_tokens=DEFAULT_MAX_TOKENS,
    )
    parser.add_argument("--system", metavar="TEXT", help="system message in front of the conversation")
    args = parser.parse_args(argv)
    sampler = Sampler(cli.sampling_options(args))
    engine = cli.open_engine(args.artifact, args.threads)
    spec = engine.manifest.tokenizer
    if spec is None:
        raise UserError(
            f"a chat needs a tokenizer, and {args.artifact} has none: compile from a checkpoint that has one"
        )
    tokenizer = open_tokenizer(spec, engine.folder)
    encoder = open_conversation_encoder(spec, engine.folder, tokenizer)
    conversation = Conversation(engine, tokenizer, encoder, sampler, max_tokens=args.max_tokens, system=args.system)
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  # gives input() line editing and history
    print(cli.dim("/reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops a reply", sys.stdout))
    converse(conversation, lambda: input("> "), cli.write)
    return 0


if __name__ == "__main__":
    run_command(main)
