"""A conversation that keeps its caches between turns, so that each turn feeds only what is new."""

from collections.abc import Generator, Mapping

from runtime.decoding.generation import TokenModel, generate
from runtime.decoding.sampler import Sampler
from runtime.errors import UserError
from runtime.text.conversation_encoder import ConversationEncoder
from runtime.text.message_parts import SEPARATOR
from runtime.text.messages import Message
from runtime.text.replies import content_of
from runtime.text.stream import Step, with_text
from runtime.text.tokenizer import Tokenizer


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

    @property
    def dividers(self) -> Mapping[int, str]:
        """As those of `Tokenizer`."""
        return self._tokenizer.dividers

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = list(self._system)
        self._unanswered: str | None = None  # what the user said since the last reply that was not empty
        self._cached: list[int] | None = None  # None: unknown, so the caches must be emptied before use

    def say(self, text: str) -> Generator[Step, None, None]:
        """The steps of the reply. Closing the iterator early cuts the reply short there.

        An empty reply is left out of the conversation, since hardly any format allows one; the user's next message then
        continues the one that it answered.

        Raises `UserError` if the model's format does not allow the conversation or if the conversation does not fit the
        caches; it then stays as it was.
        """
        asked = text if self._unanswered is None else self._unanswered + SEPARATOR + text
        messages = [*self._messages, Message(role="user", content=asked)]
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
        reply: list[Step] = []
        generated: list[int] = []
        self._cached = None  # while the model runs, an interrupt leaves the caches in an unknown state
        try:
            for step in with_text(steps, self._tokenizer.text_stream(())):
                reply.append(step)
                generated.append(step.token_id)
                self._cached = ids + generated[:-1]
                yield step
                if step.finish_reason is None:
                    self._cached = None
        finally:
            if generated:
                said = content_of(reply, self._tokenizer, reasoning=self._encoder.writes_reasoning)
                self._unanswered = None if said else asked
                if said:
                    self._messages = [*messages, Message(role="assistant", content=said)]

    def remark(self, last: Step) -> str:
        """The reason that a reply ended with this step, in one sentence; empty if the model ended it by itself."""
        if last.finish_reason == "stop":
            return ""
        if last.finish_reason is None:
            return "interrupted"
        if self._model.room() == 0:
            return "the cache is full: type /reset to start over, or compile with a larger shape.cache_len"
        return f"the reply has reached {self._max_tokens} tokens, the limit that --max-tokens sets"

    def _reuse(self, ids: list[int]) -> list[int]:
        """The ids in the caches if `ids` continue them; otherwise none, and the caches are emptied."""
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
                "type /reset to start over, or compile with a larger shape.cache_len"
            )
