"""The calls of the model for choices that have a slot, and what each choice gets from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.logprobs import TokenLogprobs, row_logprobs
from runtime.decoding.sampler import NO_ID, NOT_FINITE, SampledRow, sample_rows
from runtime.engines.slot_model import Row, SlotModel
from runtime.errors import UserError
from runtime.scheduling.call_times import CallTimes
from runtime.scheduling.choice import Choice
from runtime.scheduling.chunking import chunk_of_prompt, next_chunk
from runtime.scheduling.speculation import Candidate, DraftPlanner
from runtime.scheduling.statistics import Statistics
from runtime.text.stream import Step


@dataclass(frozen=True)
class Outcome:
    """What a call gave a choice: new tokens, and the sentence of an error with which it must end.

    scores: log probabilities of the next tokens of its prompt.
    """

    choice: Choice
    steps: Sequence[Step] = ()
    error: str | None = None
    scores: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True)
class Part:
    """The rows of one choice in a step: of `ids`, the last `drafts` are guesses."""

    choice: Choice
    ids: list[int]
    drafts: int = 0

    @property
    def guesses(self) -> list[int]:
        """The drafts."""
        return self.ids[len(self.ids) - self.drafts :]

    def sampled_rows(self) -> list[SampledRow]:
        """The draw after the last id that is no guess, and after each guess."""
        return [SampledRow(self.choice.sampler, self.guesses[:count]) for count in range(self.drafts + 1)]


class Calls:
    """Makes calls and measures them.

    same_calls: a prompt is always fed by the same calls, whatever they cost.
    most_drafts: guessed tokens of a choice in a step; 0 makes none.
    """

    def __init__(
        self,
        model: SlotModel,
        clock: Callable[[], float],
        statistics: Statistics,
        *,
        same_calls: bool,
        most_drafts: int,
    ) -> None:
        self._model = model
        self._clock = clock
        self._statistics = statistics
        self._same_calls = same_calls
        self._most_drafts = most_drafts
        self._chunk_times, self._step_times = CallTimes(), CallTimes()
        self._planner = DraftPlanner(model.step_rows, self._step_times.about)

    def fed(self, choice: Choice) -> int:
        """Tokens of a choice's prompt that its slot holds."""
        return len(self._model.tokens(choice.held_slot))

    def unfed(self, choice: Choice) -> int:
        """Tokens of a choice's prompt that are still to be fed."""
        return len(choice.request.prompt_ids) - self.fed(choice)

    def feed_chunk(self, choice: Choice, end: int, budget: float | None) -> tuple[int, Outcome]:
        """One prefill call for a prompt, at most up to its first `end` tokens; also returns how many tokens it fed.

        `budget` is in seconds; None takes what feeds the whole prompt soonest.
        """
        prompt, fed = choice.request.prompt_ids, self.fed(choice)
        tokens = end - fed
        if self._same_calls:
            size = chunk_of_prompt(tokens, self._model.chunks)
        else:
            size = next_chunk(tokens, self._model.chunks, self._chunk_times.at_most, budget)
        ids = prompt[fed : fed + min(size, tokens)]
        start = self._clock()
        try:
            logits = self._model.prefill(choice.held_slot, ids)[None]
        except UserError as error:
            return 0, Outcome(choice, error=str(error))
        self._chunk_times.add(size, self._clock() - start)
        self._statistics.chunks += 1
        self._statistics.prompt_tokens += len(ids)
        if fed + len(ids) < len(prompt):
            return len(ids), Outcome(choice)
        (outcome,) = self._drawn([Part(choice, list(ids))], logits)
        return len(ids), outcome

    def score_chunk(self, choice: Choice) -> Outcome:
        """One step with the next tokens of a prompt, whose every row gives the logits of the token after it."""
        prompt, fed, count = choice.request.prompt_ids, self.fed(choice), choice.request.prompt_logprobs
        assert count is not None
        ids = prompt[fed : fed + self._model.step_rows[-1]]
        start = self._clock()
        try:
            logits = self._model.step([Row(choice.held_slot, token) for token in ids])
        except UserError as error:
            return Outcome(choice, error=str(error))
        self._step_times.add(len(ids), self._clock() - start)
        self._statistics.steps += 1
        self._statistics.rows += len(ids)
        self._statistics.prompt_tokens += len(ids)
        if not np.isfinite(logits).all():
            return Outcome(choice, error=NOT_FINITE)
        following = prompt[fed + 1 : fed + 1 + len(ids)]
        scores = row_logprobs(logits[: len(following)], following, [count] * len(following))
        if len(following) == len(ids) or not choice.left:
            return Outcome(choice, scores=scores)
        (outcome,) = self._drawn([Part(choice, list(ids[-1:]))], logits[-1:])
        return replace(outcome, scores=scores)

    def tails(self, prompts: Sequence[Choice], decoding: int) -> list[Choice]:
        """The prompts whose rest is fed by rows of the next step, since that is expected to take less time.

        `decoding` rows of it are needed by others. There are none where a prompt is always fed by the same calls.
        """
        tails: list[Choice] = []
        rows = decoding
        for choice in () if self._same_calls else prompts:
            if choice.scores_prompt:
                continue
            tokens = self.unfed(choice)
            if rows + tokens > self._model.step_rows[-1]:
                continue
            chunk = next_chunk(tokens, self._model.chunks, self._chunk_times.at_most, None)
            without = self._step_times.about(rows) if rows else 0.0
            if self._step_times.about(rows + tokens) <= self._chunk_times.at_most(chunk) + without:
                tails.append(choice)
                rows += tokens
        return tails

    def step(self, tails: Sequence[Choice], decoding: Sequence[Choice]) -> list[Outcome]:
        """One step with the rests of prompts, a row for each choice that is being generated, and drafts."""
        parts = [Part(choice, list(choice.request.prompt_ids[self.fed(choice) :])) for choice in tails]
        parts += self._with_drafts(decoding, sum(len(part.ids) for part in parts) + len(decoding))
        start = self._clock()
        try:
            logits = self._model.step([Row(part.choice.held_slot, token) for part in parts for token in part.ids])
        except UserError as error:
            return [Outcome(part.choice, error=str(error)) for part in parts]
        ends = np.cumsum([len(part.ids) for part in parts])
        drawn_from = [row for part, end in zip(parts, ends, strict=True) for row in range(end - part.drafts - 1, end)]
        outcomes = self._drawn(parts, logits[drawn_from])
        self._step_times.add(len(logits), self._clock() - start)
        self._statistics.steps += 1
        self._statistics.rows += len(logits)
        self._statistics.prompt_tokens += sum(len(part.ids) for part in parts[: len(tails)])
        return outcomes

    def _with_drafts(self, decoding: Sequence[Choice], rows: int) -> list[Part]:
        """A part for each of these choices, in a step that has `rows` rows without drafts."""
        if not self._most_drafts:
            return [Part(choice, choice.history[-1:]) for choice in decoding]
        for choice in decoding:
            choice.drafts.propose(choice.history, min(self._most_drafts, choice.left - 1))
            if choice.sampler.constraint is not None:
                choice.drafts.cut(choice.sampler.constraint.permitted(choice.drafts.proposal.drafts))
        plan = self._planner.drafts(
            [Candidate(choice.drafts.chance, len(choice.drafts.proposal.drafts)) for choice in decoding], rows
        )
        return [
            Part(choice, choice.history[-1:] + choice.drafts.proposal.drafts[:drafts], drafts)
            for choice, drafts in zip(decoding, plan, strict=True)
        ]

    def _drawn(self, parts: Sequence[Part], logits: NDArray[np.float32]) -> list[Outcome]:
        """Draw from logits (n, vocab), which are those of all parts' `sampled_rows`, and take what is drawn."""
        rows = [part.sampled_rows() for part in parts]
        pieces = np.split(logits, np.cumsum([len(own) for own in rows])[:-1])
        try:
            drawn = sample_rows(logits, [row for own in rows for row in own])
        except UserError:  # of one row's options or grammar, for which the others are not to blame
            return [self._drawn_alone(*one) for one in zip(parts, rows, pieces, strict=True)]
        own_drawn = np.split(drawn, np.cumsum([len(own) for own in rows])[:-1])
        return [self._taken(*one) for one in zip(parts, own_drawn, pieces, strict=True)]

    def _drawn_alone(self, part: Part, rows: Sequence[SampledRow], logits: NDArray[np.float32]) -> Outcome:
        try:
            return self._taken(part, sample_rows(logits, rows), logits)
        except UserError as error:
            return Outcome(part.choice, error=str(error))

    def _taken(self, part: Part, drawn: NDArray[np.int64], logits: NDArray[np.float32]) -> Outcome:
        """Take what was drawn after the last token and, as long as they are right, after each draft.

        The drafts after these are forgotten, so that the slot is as without them.
        """
        choice, drafts = part.choice, part.guesses
        steps: list[Step] = []
        error = None
        for place, token in enumerate(drawn.tolist()):
            if token == NO_ID:
                error = NOT_FINITE
                break
            steps.append(choice.add(token, logits[place]))
            if steps[-1].finish_reason is not None or drafts[place : place + 1] != [token]:
                break
        wrong = len(drafts) + 1 - max(len(steps), 1)
        if wrong:
            self._model.rewind(choice.held_slot, len(self._model.tokens(choice.held_slot)) - wrong)
        choice.drafts.learn([step.token_id for step in steps])
        self._statistics.drafts_proposed += len(drafts)
        self._statistics.drafts_accepted += len(drafts) - wrong
        self._statistics.generated_tokens += len(steps)
        return Outcome(choice, steps, error)
