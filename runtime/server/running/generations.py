"""Requests on their way: whether there is a place for one, and its events as they come out of the engine's thread.

Everything here runs in the event loop's thread.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from runtime.decoding.logprobs import TokenLogprobs
from runtime.scheduling.requests import Ended, Event, Failed, Generated, Request, RequestId, Started
from runtime.server.http.failures import RequestFailure, broken
from runtime.server.http.request_ids import current_request_id
from runtime.server.running.places import check_place
from runtime.server.settings import ServerSettings
from runtime.text.stream import Step

ABORTED = "abort"  # vLLM's name, in measurements, for what was not answered to the end
LEAST_RETRY, MOST_RETRY = 1, 60  # seconds that a client is told to wait


@dataclass
class Times:
    """When things happened to one choice, in seconds of a monotonic clock."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    generated: int = 0
    cached_tokens: int = 0


@dataclass
class Texts:
    """What a generation was asked, and what each choice has answered; kept only if it is to be logged."""

    prompt: str
    answers: list[str]


@dataclass(eq=False)
class Generation:
    """One request that the engine's thread has; its events are read once, by `events`.

    label: the id that the client knows.
    counted: tokens that its reader has taken.
    reasons: why each choice that is complete has ended.
    prompt_scores: log probabilities of the prompt's tokens after the first that its reader has taken.
    """

    request: Request
    label: str
    times: Sequence[Times]
    _cancel: Callable[[RequestId, int | None], object]
    _events: "asyncio.Queue[Event | RequestFailure]" = field(default_factory=asyncio.Queue)
    _open: set[int] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None
    counted: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    texts: Texts | None = None
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open = set(range(self.request.choices))

    async def events(self) -> AsyncIterator[Event]:
        """The events of all choices until each is over; raises `RequestFailure` if a choice has failed."""
        while self._open:
            event = await self._events.get()
            if isinstance(event, RequestFailure):
                raise event
            if isinstance(event, Failed):
                raise broken(event.error)
            if event.choice not in self._open:
                continue
            if isinstance(event, Ended):
                self._open.discard(event.choice)
            yield event

    def take(self, choice: int, step: Step) -> None:
        """Note what the reader of the events has made of one."""
        self.counted += 1
        if step.finish_reason is not None:
            self.reasons[choice] = step.finish_reason
        if self.texts is not None:
            self.texts.answers[choice] += step.text

    def end_choice(self, choice: int) -> None:
        """End one choice, whose text is complete; no more of its events are given."""
        self._open.discard(choice)
        self._cancel(self.request.request_id, choice)

    def cancel(self) -> None:
        """End what still runs; without effect on a request that is over."""
        if self.timer is not None:
            self.timer.cancel()
        if self._open:
            self._open.clear()
            self._cancel(self.request.request_id, None)

    def expire(self, failure: RequestFailure) -> None:
        """End everything with a failure, also if nobody reads it, as behind a client that takes no more bytes."""
        self.put(failure)
        self._cancel(self.request.request_id, None)

    def put(self, event: Event | RequestFailure) -> None:
        """Add an event, or a failure that ends them all."""
        self._events.put_nowait(event)


def _reason_of(event: Ended | Failed, generation: Generation) -> str:
    """Why a choice is over; one that its reader ends is cancelled, though its text may be complete."""
    if isinstance(event, Failed):
        return "error"
    return generation.reasons.get(event.choice, ABORTED) if event.reason == "cancelled" else event.reason


class Generations:
    """All requests that the engine's thread has.

    submit, cancel: those of the thread.
    over: is called with each choice that is over, and the reason.
    """

    def __init__(
        self,
        settings: ServerSettings,
        submit: Callable[[Request], object],
        cancel: Callable[[RequestId, int | None], object],
        over: Callable[[Request, Times, str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._submit = submit
        self._cancel = cancel
        self._over = over
        self._clock = clock
        self._running: dict[RequestId, Generation] = {}
        self._waiting: dict[tuple[RequestId, int], int] = {}  # prompt tokens of each choice that has no slot yet
        self._left: dict[RequestId, set[int]] = {}  # choices that are not over
        self._numbers = itertools.count(1)
        self._holding: set[tuple[RequestId, int]] = set()  # choices with a slot
        self.slots = 0  # of the model, once it is open
        self.finished = 0

    @property
    def running(self) -> int:
        """Requests that are not over."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Choices without a slot."""
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of the choices without a slot."""
        return sum(self._waiting.values())

    def check_place(self, choices: int, tokens: int = 0) -> None:
        """Raise `RequestFailure` unless so many more choices, with so many prompt tokens in all, may wait.

        One request may always wait by itself, however long its prompt is. It is asked before a text is tokenized too,
        so that refusing costs little.
        """
        free = max(self.slots - len(self._holding), 0)  # those who arrive together have not all got theirs yet
        check_place(self._settings, self, choices, tokens, self._retry_after, free)

    def label(self, request_id: RequestId) -> str | None:
        """The id that the client of a running request knows."""
        generation = self._running.get(request_id)
        return None if generation is None else generation.label

    def new_id(self) -> int:
        """A number that no request has had."""
        return next(self._numbers)

    def submit(self, request: Request) -> Generation:
        """Hand a request, for which `check_place` has found one, to the engine's thread."""
        now = self._clock()
        generation = Generation(
            request, current_request_id.get(), [Times(now) for _ in range(request.choices)], self._cancel
        )
        self._running[request.request_id] = generation
        self._left[request.request_id] = set(range(request.choices))
        self._waiting.update({(request.request_id, i): len(request.prompt_ids) for i in range(request.choices)})
        self._submit(request)
        seconds = self._settings.request_seconds
        late = broken(f"the request took longer than {seconds:g} s, the server's limit", status=504, code="timeout")
        generation.timer = asyncio.get_running_loop().call_later(seconds, generation.expire, late)
        return generation

    def happened(self, events: Sequence[Event]) -> None:
        """Take the events of a call of the model."""
        now = self._clock()
        for event in events:
            generation = self._running.get(event.request_id)
            if generation is not None:
                self._note(event, generation, now)
                generation.put(event)

    def fail_all(self, failure: RequestFailure) -> None:
        """End every request with this failure."""
        for generation in self._running.values():
            generation.put(failure)
        self._running.clear()
        self._left.clear()
        self._waiting.clear()
        self._holding.clear()

    def _note(self, event: Event, generation: Generation, now: float) -> None:
        times = generation.times[event.choice]
        if isinstance(event, Started):
            times.started, times.cached_tokens = now, event.cached_tokens
            self._waiting.pop((event.request_id, event.choice), None)
            self._holding.add((event.request_id, event.choice))
        elif isinstance(event, Generated):
            times.generated += 1
            times.first_token, times.last_token = times.first_token or now, now
        elif isinstance(event, Ended | Failed):
            times.ended = now
            self._waiting.pop((event.request_id, event.choice), None)
            self._holding.discard((event.request_id, event.choice))
            self._left[event.request_id].discard(event.choice)
            self._over(generation.request, times, _reason_of(event, generation))
            if not self._left[event.request_id]:
                del self._left[event.request_id], self._running[event.request_id]
                self.finished += 1

    def _retry_after(self) -> int:
        """Seconds until some of those who run have probably ended, from how long the last ones took."""
        ages = [self._clock() - generation.times[0].arrived for generation in self._running.values()]
        return int(min(MOST_RETRY, max(LEAST_RETRY, max(ages, default=0.0) / 2)))
