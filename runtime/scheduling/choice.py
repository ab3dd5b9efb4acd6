"""One choice of a request on its way through the scheduler."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.generation import finish_reason_of
from runtime.decoding.logprobs import row_logprobs
from runtime.decoding.sampler import Sampler
from runtime.scheduling.requests import Request
from runtime.scheduling.speculation import DraftHistory
from runtime.text.stream import Step


@dataclass(eq=False)
class Choice:
    """A sequence that continues a request's prompt; `left` more tokens may follow."""

    request: Request
    index: int
    left: int
    leader: "Choice | None"  # the first choice of the request, which computes the prompt for all of them
    sampler: Sampler
    history: list[int] = field(init=False)  # the prompt and the tokens drawn
    slot: int | None = None
    prompt_done: bool = False
    over: bool = False
    drafts: DraftHistory = field(default_factory=DraftHistory)

    def __post_init__(self) -> None:
        self.sampler.begin(self.request.prompt_ids)
        self.history = list(self.request.prompt_ids)

    def waits_for_leader(self) -> bool:
        """Whether the prompt is still being computed by the first choice."""
        return self.leader is not None and not (self.leader.prompt_done or self.leader.over)

    @property
    def scores_prompt(self) -> bool:
        """Whether the log probabilities of the prompt's own tokens are wanted of this choice."""
        return self.request.prompt_logprobs is not None and self.index == 0

    @property
    def held_slot(self) -> int:
        """The slot, for a choice that has one."""
        assert self.slot is not None
        return self.slot

    def add(self, token_id: int, logits: NDArray[np.float32]) -> Step:
        """Append a token that was drawn from logits (vocab,); returns its step."""
        reason = finish_reason_of(token_id, self.left, self.request.eos_ids)
        self.history.append(token_id)
        self.sampler.append(token_id)
        self.left -= 1
        if self.request.logprobs is None:
            return Step(token_id, finish_reason=reason)
        (found,) = row_logprobs(logits[None], [token_id], [self.request.logprobs])
        return Step(token_id, found.top, reason, logprob=found.chosen)
