"""The one service of a process: its model, the requests on their way, and the state that it is in."""

import asyncio
import contextvars
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from runtime.scheduling.requests import Event, Request
from runtime.scheduling.scheduler import SlotView
from runtime.scheduling.statistics import Statistics
from runtime.server.api.status import Health, State
from runtime.server.http.event_stream import ClientLeftError
from runtime.server.http.failures import RequestFailure, too_busy, unavailable
from runtime.server.metrics import Metrics
from runtime.server.running.engine_thread import EngineThread, Watcher
from runtime.server.running.generations import Generations, Times
from runtime.server.running.head_calls import HeadCalls
from runtime.server.running.served_model import ServedModel
from runtime.server.settings import ServerSettings

Result = TypeVar("Result")
LOADING_RETRY = 5  # seconds
ENCODER_RETRY = 1  # seconds; most texts are encoded in milliseconds
END_SECONDS = 10.0  # that the engine's thread has to end after its last call


class Service:
    """Runs in the event loop; `start` begins to open the artifact, whose thread then takes requests.

    name: the name under which clients ask for the model.
    """

    def __init__(self, name: str, open_model: Callable[[], ServedModel], settings: ServerSettings) -> None:
        self.name = name
        self.settings = settings
        self.created = int(time.time())
        self.state: State = "loading"
        self._started = time.monotonic()
        self._failure = ""
        self._model: ServedModel | None = None
        self._changed = asyncio.Event()
        self._takes_last = False  # while it is ending, and still takes requests
        self._called: set[asyncio.Future[Any]] = set()  # results that the engine's thread owes
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._encoding = 0  # texts that this thread has, and those that wait for it
        self._ended: RequestFailure | None = None  # of the engine's thread, which answers nothing any more
        self._thread = EngineThread(open_model, settings.scheduler(), self._watcher())
        self.generations = Generations(settings, self._thread.submit, self._thread.cancel, self._over)
        self.heads = HeadCalls(settings, self.call, self._text_over)
        self.metrics = Metrics(name, self.statistics, self, self.health)

    def start(self) -> None:
        """Begin to open the artifact."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def capacity(self) -> int | None:
        """How many tokens a sequence holds; None without a limit, and while the model is being loaded."""
        return None if self._model is None else self._model.capacity

    @property
    def uptime(self) -> float:
        """Seconds since the service was made."""
        return time.monotonic() - self._started

    def model(self, name: str | None = None) -> ServedModel:
        """The model, for a request that asks for it by `name`; raises `RequestFailure` if it cannot be had now."""
        self.check_open()
        if name is not None and name != self.name:
            raise RequestFailure(
                404,
                f"the model {name!r} is not here, expected {self.name!r}",
                param="model",
                code="model_not_found",
            )
        assert self._model is not None
        return self._model

    def check_open(self) -> None:
        """Raise `RequestFailure` unless requests are taken."""
        if self.state == "loading":
            raise unavailable("the model is being loaded; try again soon", code="loading", retry_after=LOADING_RETRY)
        if self.state == "draining" and not self._takes_last:
            raise unavailable(
                "the server is ending and takes no more requests", code="draining", retry_after=LOADING_RETRY
            )
        if self.state == "failed":
            raise unavailable(
                f"the model cannot be used: {self._failure}", code="engine_failed", retry_after=LOADING_RETRY
            )

    def check_not_ended(self) -> None:
        """Raise `RequestFailure` if the engine's thread takes nothing more, though a request has come in before."""
        if self._ended is not None:
            raise self._ended.about(None)

    def health(self) -> Health:
        """Whether the engine's thread is alive, which a call that hangs is not."""
        silent = self._thread.silent_seconds()
        if self.state != "failed" and self.state != "loading" and silent > self.settings.stalled_seconds:
            return Health("failed", f"the engine has not answered for {silent:,.0f} s")
        return Health(self.state, self._failure)

    def statistics(self) -> Statistics:
        """What was counted by the scheduler, or for a head that generates no text."""
        if self._model is not None and self._model.slots is None:
            return self.heads.statistics()
        return self._thread.statistics()

    @property
    def waiting(self) -> int:
        """Sequences that the model does not hold yet."""
        return self.generations.waiting + self.heads.waiting

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of these."""
        return self.generations.queued_tokens + self.heads.queued_tokens

    @property
    def running(self) -> int:
        """Requests that are not over."""
        return self.generations.running + self.heads.running

    @property
    def finished(self) -> int:
        """Requests that are over."""
        return self.generations.finished + self.heads.finished

    def new_answer_id(self, kind: str) -> str:
        """An id for an answer, such as chatcmpl-..., which no other answer has."""
        return f"{kind}-{secrets.token_hex(16)}"

    def now(self) -> int:
        """The time in whole seconds, as answers give it."""
        return int(time.time())

    async def encode(self, function: Callable[[], Result]) -> Result:
        """The result of a function that turns texts into ids, in a thread for that alone, so that streams go on.

        Raises `RequestFailure` if as many wait for that thread already as may wait for the model.
        """
        most = self.settings.max_queued + self.generations.slots
        if self._encoding >= most:
            raise too_busy(f"{self._encoding} texts wait to be tokenized already; try again later", ENCODER_RETRY)
        context = contextvars.copy_context()
        self._encoding += 1
        try:
            return await self._loop.run_in_executor(self._encoder, context.run, function)
        finally:
            self._encoding -= 1

    async def slots(self) -> Sequence[SlotView]:
        """What each slot does; nothing while there is no model, or it does not answer."""
        return await self.call(self._thread.slots) if self.health().status in ("ready", "draining") else ()

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function that is called in the engine's thread between two calls of the model.

        It is not called if nobody awaits the result any more. Raises `RequestFailure` if the engine fails before.
        """
        self.check_not_ended()
        found: asyncio.Future[Result] = self._loop.create_future()
        self._called.add(found)
        found.add_done_callback(self._called.discard)

        def settle(result: Result | Exception) -> None:
            if found.done():
                return
            if isinstance(result, Exception):
                found.set_exception(result)
            else:
                found.set_result(result)

        def unless_done() -> Result:
            if found.done():
                raise ClientLeftError
            return function()

        self._thread.call(unless_done, lambda result: self._loop.call_soon_threadsafe(settle, result))
        return await found

    async def wait_until_open(self) -> None:
        """Wait until requests are taken, or the model has failed."""
        while self.state == "loading":
            self._changed.clear()
            await self._changed.wait()

    async def drain(self, hurry: asyncio.Event) -> None:
        """Say that the server ends, then take no more requests, and let those that run end.

        Both last at most as long as the settings say, and until `hurry`.
        """
        await self._take_last(hurry)
        deadline = time.monotonic() + self.settings.drain_seconds
        while (self.running or self._encoding) and time.monotonic() < deadline and not hurry.is_set():
            await asyncio.sleep(0.02)
        self._fail_all(
            unavailable(
                "the server has ended before the answer was complete", code="draining", retry_after=LOADING_RETRY
            )
        )
        await asyncio.to_thread(self._thread.end, END_SECONDS)

    async def _take_last(self, hurry: asyncio.Event) -> None:
        """Say that the server ends; a model that could be used takes requests until others must have heard of it."""
        self._takes_last = self.state == "ready"
        if self.state != "failed":
            self._set_state("draining")
        if self._takes_last:
            with suppress(TimeoutError):
                await asyncio.wait_for(hurry.wait(), self.settings.unready_seconds)
            self._takes_last = False

    def _watcher(self) -> Watcher[ServedModel]:
        def in_loop(function: Callable[..., object]) -> Callable[..., object]:
            return lambda *arguments: self._loop.call_soon_threadsafe(function, *arguments)

        return Watcher(in_loop(self._opened), in_loop(self._happened), in_loop(self._failed))

    def _set_state(self, state: State) -> None:
        self.state = state
        self._changed.set()

    def _opened(self, model: ServedModel) -> None:
        self._model = model
        self.generations.slots = model.engine.slots
        self.metrics.set_slots(model.engine.slots)
        if self.state == "loading":
            self._set_state("ready")

    def _happened(self, events: Sequence[Event]) -> None:
        self.generations.happened(events)
        self.metrics.step_done(events)

    def _failed(self, sentence: str) -> None:
        self._failure = sentence
        self._set_state("failed")
        self._fail_all(unavailable(sentence, code="engine_failed", retry_after=LOADING_RETRY))

    def _fail_all(self, failure: RequestFailure) -> None:
        """End everything that waits for the engine with this failure, and all that still comes to it."""
        self._ended = failure
        self.generations.fail_all(failure)
        for owed in list(self._called):
            if not owed.done():
                owed.set_exception(failure)

    def _text_over(self, times: Times, tokens: int, reason: str) -> None:
        self.metrics.text_over(times, tokens, reason)

    def _over(self, request: Request, times: Times, reason: str) -> None:
        self.metrics.choice_over(request, times, reason)
