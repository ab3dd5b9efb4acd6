"""A conversation at a terminal, of which each turn feeds only what is new: a slot still holds the turns before it."""

from collections.abc import Generator, Mapping

from runtime.decoding.options import SamplingOptions
from runtime.engines.slot_model import SlotModel, capacity_of
from runtime.errors import UserError
from runtime.scheduling.completions import completions
from runtime.scheduling.settings import SchedulerSettings
from runtime.text.conversation_encoder import ConversationEncoder
from runtime.text.message_parts import SEPARATOR
from runtime.text.messages import Message
from runtime.text.replies import content_of
from runtime.text.stream import Step
from runtime.text.tokenizer import Tokenizer


class Conversation:
    """The messages so far."""

    def __init__(
        self,
        model: SlotModel,
        tokenizer: Tokenizer,
        encoder: ConversationEncoder,
        options: SamplingOptions,
        *,
        max_tokens: int,
        system: str | None = None,
        settings: SchedulerSettings | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._options = options
        self._max_tokens = max_tokens
        self._settings = settings
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
        self._replies = 0
        self._full = False  # whether the last reply has filled its slot

    def say(self, text: str) -> Generator[Step, None, None]:
        """The steps of the reply. Closing the iterator early cuts the reply short there.

        An empty reply is left out of the conversation, since hardly any format allows one; the user's next message then
        continues the one that it answered.

        Raises `UserError` if the model's format does not allow the conversation or if the conversation does not fit a
        slot; it then stays as it was.
        """
        asked = text if self._unanswered is None else self._unanswered + SEPARATOR + text
        messages = [*self._messages, Message(role="user", content=asked)]
        ids = self._encoder.encode(messages)
        capacity = capacity_of(self._model)
        if capacity is not None and len(ids) > capacity:
            raise UserError(
                f"the conversation has {len(ids)} tokens, and a slot holds {capacity}: "
                "type /reset to start over, or compile with a larger shape.cache_len"
            )
        steps = completions(
            self._model,
            [ids],
            self._options.numbered(self._replies),
            max_tokens=self._max_tokens,
            eos_ids=self._tokenizer.spec.eos_ids,
            texts=[self._tokenizer.text_stream(())],
            settings=self._settings,
        )
        reply: list[Step] = []
        try:
            for _, step in steps:
                reply.append(step)
                self._full = capacity is not None and len(ids) + len(reply) > capacity
                yield step
        finally:
            if reply:
                self._replies += 1
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
        if self._full:
            return "the slot is full: type /reset to start over, or compile with a larger shape.cache_len"
        return f"the reply has reached {self._max_tokens} tokens, the limit that --max-tokens sets"
