"""The loop that decides which compiled call comes next, for many requests that come and go at any time."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.decoding.generation import row_samplers
from runtime.engines.slot_model import SlotModel, capacity_of
from runtime.scheduling.calls import Calls, Outcome
from runtime.scheduling.choice import Choice
from runtime.scheduling.prefix_cache import PrefixCache, check_fits, reuse_mode
from runtime.scheduling.requests import Ended, EndReason, Event, Failed, Generated, Request, RequestId, Scored, Started
from runtime.scheduling.settings import SchedulerSettings
from runtime.scheduling.statistics import Statistics


@dataclass(frozen=True)
class SlotView:
    """What a slot does now: nothing, a prompt, or a text that is generated; and how many tokens it holds."""

    slot: int
    state: Literal["idle", "prompt", "decoding"]
    tokens: int
    request_id: RequestId | None


class Scheduler:
    """Runs requests side by side on a model's slots; each `turn` makes at most one call of the model.

    A request gets the same tokens whatever else runs, where the model's results do not depend on the call. `clock`
    returns seconds; it only measures how long calls take.
    """

    def __init__(self, model: SlotModel, settings: SchedulerSettings, clock: Callable[[], float]) -> None:
        self._model = model
        self._settings = settings
        mode = reuse_mode(model, settings)
        speculates = model.same_bits_in_any_call if settings.speculate is None else settings.speculate
        self.prefixes = PrefixCache(model, mode, settings.snapshot_bytes)
        self.statistics = Statistics()
        self._calls = Calls(
            model,
            clock,
            self.statistics,
            same_calls=mode == "exact",
            most_drafts=settings.most_drafts if speculates else 0,
        )
        self._capacity = capacity_of(model)
        # every choice that is not over is in exactly one of these
        self._waiting: deque[Choice] = deque()  # without a slot, in order of arrival
        self._following: list[Choice] = []  # with a slot, until the first choice has computed their prompt
        self._prompts: list[Choice] = []  # with a part of the prompt still to be fed; whose turn is next comes first
        self._decoding: list[Choice] = []  # with one token still to be fed; who waited longest comes first
        self._cancelled: list[Choice] = []
        self._steps_since_chunk = settings.steps_per_chunk

    def submit(self, request: Request) -> None:
        """Take a request; its choices wait for slots in order of arrival.

        Raises `UserError` if the prompt does not fit a slot. The request's id must not be in use.
        """
        assert all(choice.request.request_id != request.request_id for choice in self._all())
        check_fits(request.prompt_ids, self._capacity)
        left = request.max_tokens
        if self._capacity is not None:
            left = min(left, self._capacity - len(request.prompt_ids) + 1)
        leader = None
        for index, sampler in enumerate(row_samplers(request.options, request.choices, request.grammar)):
            choice = Choice(request, index, left, leader, sampler)
            leader = leader or choice
            self._waiting.append(choice)
        self._count()

    def cancel(self, request_id: RequestId, choice: int | None = None) -> None:
        """End a request, or one choice of it, at the start of the next turn; one that is over is left alone."""
        self._cancelled += [
            one
            for one in self._all()
            if one.request.request_id == request_id and choice in (None, one.index) and one not in self._cancelled
        ]

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._all())

    def turn(self) -> list[Event]:
        """Make at most one call, and return what happened, in order."""
        events: list[Event] = []
        for choice in self._cancelled:
            self._end(choice, "cancelled", events)
        self._cancelled = []
        self._admit(events)
        tails = self._calls.tails(self._prompts, len(self._decoding))
        chunked = [choice for choice in self._prompts if choice not in tails]
        others = tails or self._decoding
        if chunked and (not others or self._steps_since_chunk >= self._settings.steps_per_chunk):
            self._feed_prompt(chunked[0], events)
        elif others:
            self._step(tails, events)
        self._count()
        return events

    def view(self) -> list[SlotView]:
        """What each slot does."""
        held = {choice.slot: choice for choice in self._all() if choice.slot is not None}
        views = []
        for slot in range(self._model.slots):
            choice, tokens = held.get(slot), len(self._model.tokens(slot))
            if choice is None:
                views.append(SlotView(slot, "idle", tokens, None))
            else:
                state: Literal["prompt", "decoding"] = "decoding" if choice.prompt_done else "prompt"
                views.append(SlotView(slot, state, tokens, choice.request.request_id))
        return views

    def _all(self) -> list[Choice]:
        return [*self._waiting, *self._following, *self._prompts, *self._decoding]

    def _count(self) -> None:
        self.statistics.waiting = len(self._waiting)
        self.statistics.running = len(self._all()) - len(self._waiting)

    # Slots

    def _admit(self, events: list[Event]) -> None:
        """Give free slots to those who wait, and their prompt to those whose first choice has computed it."""
        for choice in list(self._following):
            if not choice.waits_for_leader():
                self._following.remove(choice)
                self._lead(choice)
                self._start(choice, events)
        while self._waiting and self.prefixes.has_free_slot():
            choice = self._waiting.popleft()
            if choice.waits_for_leader():
                choice.slot = self.prefixes.reserve()
                self._following.append(choice)
            else:
                self._lead(choice)
                self._start(choice, events)

    def _lead(self, choice: Choice) -> None:
        """Let the other choices wait for this one if the first choice has ended before it had computed the prompt."""
        if choice.leader is not None and not choice.leader.prompt_done:
            for other in [*self._following, *self._waiting]:
                if other.leader is choice.leader:
                    other.leader = choice

    def _start(self, choice: Choice, events: list[Event]) -> None:
        prompt = choice.request.prompt_ids
        if choice.slot is None:
            choice.slot, reuse = self.prefixes.take(prompt, reuse=not choice.scores_prompt)
        else:
            reuse = self.prefixes.fill(choice.slot, prompt)
        self.statistics.prefix_queries += len(prompt)
        self.statistics.prefix_hits += reuse.tokens
        self._prompts.append(choice)
        events.append(Started(choice.request.request_id, reuse.tokens, reuse.refused, choice=choice.index))

    def _end(self, choice: Choice, reason: EndReason, events: list[Event]) -> None:
        self._release(choice)
        events.append(Ended(choice.request.request_id, reason, choice=choice.index))

    def _release(self, choice: Choice, *, spoiled: bool = False) -> None:
        choice.over = True
        for place in (self._waiting, self._following, self._prompts, self._decoding):
            if choice in place:
                place.remove(choice)
        if choice.slot is not None:
            self.prefixes.give_back(choice.slot, spoiled=spoiled)
            choice.slot = None

    # Calls

    def _feed_prompt(self, choice: Choice, events: list[Event]) -> None:
        """One call for a prompt, whose turn then comes after those of all others."""
        self._prompts.remove(choice)
        self._prompts.append(choice)
        self._steps_since_chunk = 0
        if choice.scores_prompt:
            self._score_chunk(choice, events)
        else:
            self._feed_chunk(choice, events)

    def _score_chunk(self, choice: Choice, events: list[Event]) -> None:
        """One step for a prompt whose tokens are scored; it is over if nothing is to follow."""
        outcome = self._calls.score_chunk(choice)
        self._report(outcome, events)
        if outcome.error is None and not choice.left and not choice.over and not self._calls.unfed(choice):
            self._end(choice, "length", events)

    def _feed_chunk(self, choice: Choice, events: list[Event]) -> None:
        """One prefill call for a prompt."""
        prompt, slot = choice.request.prompt_ids, choice.held_slot
        snapshot = self.prefixes.snapshot_due(prompt)
        end = snapshot if snapshot is not None and self._calls.fed(choice) < snapshot else len(prompt)
        budget = self._settings.stall_budget if self._decoding else None
        tokens, outcome = self._calls.feed_chunk(choice, end, budget)
        if tokens:
            self.prefixes.chunk_done(slot, tokens, prompt)
        self._report(outcome, events)

    def _step(self, tails: Sequence[Choice], events: list[Event]) -> None:
        """One step. If it cannot hold all who are being generated, those take part that waited longest."""
        rows = self._model.step_rows[-1] - sum(map(self._calls.unfed, tails))
        decoding = self._decoding[:rows]
        self._decoding = self._decoding[rows:] + decoding
        self._steps_since_chunk += 1
        for outcome in self._calls.step(tails, decoding):
            self._report(outcome, events)

    def _report(self, outcome: Outcome, events: list[Event]) -> None:
        """Events of what a call gave, and what follows from it for the choice."""
        choice, request_id = outcome.choice, outcome.choice.request.request_id
        if outcome.scores:
            events.append(Scored(request_id, outcome.scores, choice=choice.index))
        events += [Generated(request_id, step, choice=choice.index) for step in outcome.steps]
        if outcome.steps and not choice.prompt_done:
            choice.prompt_done = True
            self._prompts.remove(choice)
            self._decoding.append(choice)
        if outcome.error is not None:
            # the caches may hold what made it fail
            self._release(choice, spoiled=True)
            events.append(Failed(request_id, outcome.error, choice=choice.index))
        elif outcome.steps and (reason := outcome.steps[-1].finish_reason) is not None:
            self._end(choice, reason, events)
