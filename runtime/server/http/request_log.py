"""The log: one line of JSON for each request.

What users wrote, and what they got, is in it only if the settings say so.
"""

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import msgspec

from runtime.server.running.generations import Generation, Texts
from runtime.text.tokenizer import Tokenizer

LONGEST_NAME = 128  # characters of what a client calls its model or its user
DIGITS = 6  # of seconds


@dataclass
class LogLine:
    """What is logged of one request; `model` and `user` are those that the client named, if it named any."""

    time: float
    request_id: str
    method: str
    path: str
    status: int = 0
    seconds: float = 0.0
    error: str | None = None
    model: str | None = None
    user: str | None = None
    generations: list[Generation] = field(default_factory=list)

    def text(self) -> bytes:
        """The line as JSON; what does not apply is left out."""
        names = ("time", "request_id", "method", "path", "status", "seconds", "error", "model", "user")
        found = {name: getattr(self, name) for name in names}
        return msgspec.json.encode(
            {name: value for name, value in found.items() if value is not None} | _tokens(self.generations)
        )

    def asked(self, body: object) -> None:
        """Take what a request names."""
        model, user = getattr(body, "model", None), getattr(body, "user", None)
        self.model = model[:LONGEST_NAME] if isinstance(model, str) else None
        self.user = user[:LONGEST_NAME] if isinstance(user, str) else None


# the line of the request that is being answered
current_line: ContextVar[LogLine | None] = ContextVar("current_line", default=None)


def log_generation(generation: Generation, tokenizer: Tokenizer, *, texts: bool) -> None:
    """Let the line of the current request tell of a generation."""
    line = current_line.get()
    if line is None:
        return
    line.generations.append(generation)
    if texts:
        generation.texts = Texts(tokenizer.decode(generation.request.prompt_ids), [""] * generation.request.choices)


def _tokens(generations: Sequence[Generation]) -> dict[str, object]:
    """Tokens, the time to the first one, and how choices ended; those of all prompts of a request together."""
    if not generations:
        return {}
    times = [one for each in generations for one in each.times]
    first = min((one.first_token - one.arrived for one in times if one.first_token is not None), default=None)
    found: dict[str, object] = {
        "prompt_tokens": sum(len(each.request.prompt_ids) for each in generations),
        "completion_tokens": sum(each.counted for each in generations),
        "cached_tokens": sum(each.times[0].cached_tokens for each in generations),
        "ttft_seconds": None if first is None else round(first, DIGITS),
        "finish_reasons": [each.reasons.get(i) for each in generations for i in range(each.request.choices)],
    }
    texts = [each.texts for each in generations if each.texts is not None]
    if texts:
        found["prompts"] = [each.prompt for each in texts]
        found["answers"] = [answer for each in texts for answer in each.answers]
    return found


def write_to_stderr(line: LogLine) -> None:
    """Write a line of the log."""
    sys.stderr.write(line.text().decode() + "\n")
    sys.stderr.flush()
