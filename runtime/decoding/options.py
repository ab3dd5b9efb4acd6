"""How a request wants its tokens to be drawn: the fields of OpenAI's API, and those that other servers add."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from runtime.errors import UserError

MOST_BIASES = 1024  # vLLM's limit (MAX_NUM_LOGIT_BIAS_TOKENS in vllm/v1/worker/gpu/sample/logit_bias.py)

# of repetition_penalty, which divides or multiplies logits: they stay finite with any model's
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn; None omits a filter, temperature 0 takes the highest score.

    The penalties and `logit_bias` change scores, also for temperature 0. `presence_penalty` and `frequency_penalty`
    count generated tokens, `repetition_penalty` those of the prompt too. `logit_bias` adds to the logits of its ids.
    Raises `UserError` for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty depends on the tokens so far."""
        return any((self.repetition_penalty is not None, self.presence_penalty, self.frequency_penalty))

    @property
    def top_k_alone(self) -> bool:
        """Whether no filter other than top-k is set, so that a device can draw ids by itself."""
        return self.top_p is None and self.min_p is None and not self.counts_tokens and not self.logit_bias

    def numbered(self, number: int) -> Self:
        """The options with their seed plus a number, so that no two sequences share a stream of draws."""
        return self if self.seed is None else replace(self, seed=self.seed + number)

    def __post_init__(self) -> None:
        _require(
            "temperature",
            self.temperature,
            0 <= self.temperature < math.inf,
            "a finite number of at least 0 (0 is greedy)",
        )
        if self.top_k is not None:
            _require("top_k", self.top_k, self.top_k >= 1, "at least 1")
        if self.top_p is not None:
            _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        if self.min_p is not None:
            _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        if self.repetition_penalty is not None:
            _require(
                "repetition_penalty",
                self.repetition_penalty,
                LEAST_REPETITION <= self.repetition_penalty <= MOST_REPETITION,
                f"{LEAST_REPETITION:g} to {MOST_REPETITION:g} (1 is none)",
            )
        if self.seed is not None:
            _require("seed", self.seed, self.seed >= 0, "at least 0")
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            if penalty is not None:
                _require(name, penalty, -2 <= penalty <= 2, "between -2 and 2")
        self._check_biases(self.logit_bias or {})

    def _check_biases(self, biases: Mapping[int, float]) -> None:
        if len(biases) > MOST_BIASES:
            raise UserError(f"the sampling option logit_bias has {len(biases)} entries, expected at most {MOST_BIASES}")
        for token_id, bias in biases.items():
            if token_id < 0:
                raise UserError(f"the sampling option logit_bias names the token id {token_id}, expected at least 0")
            _require(f"logit_bias of token {token_id}", bias, -100 <= bias <= 100, "between -100 and 100")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `UserError` if `logit_bias` names an id that a vocabulary of this size lacks."""
        largest = max(self.logit_bias or (0,))
        if largest >= vocab_size:
            raise UserError(
                f"the sampling option logit_bias names the token id {largest}, "
                f"expected 0 to {vocab_size - 1}, the ids of the vocabulary"
            )


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"the sampling option {name} is {value}, expected {expected}")


GREEDY = SamplingOptions()
