"""The thread that runs the model: it opens the artifact, takes commands, and makes one call of the model after another.

Everything that touches the model happens in this thread. Others leave commands in a queue, which it empties between two
calls; what happened goes to `deliver`, once for each call.
"""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from runtime.engines.slot_model import SlotModel
from runtime.errors import UserError
from runtime.scheduling.requests import Event, Failed, Request, RequestId
from runtime.scheduling.scheduler import Scheduler, SlotView
from runtime.scheduling.settings import SchedulerSettings
from runtime.scheduling.statistics import Statistics

IDLE_BEAT = 0.5  # seconds after which a thread without work shows that it is alive


class Opened(Protocol):
    """What the thread opens."""

    @property
    def slots(self) -> SlotModel | None:
        """The model that generates text; None for one that does not."""


OpenedT = TypeVar("OpenedT", bound=Opened)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Watcher(Generic[OpenedT]):
    """Who is told what happens; each function is called from the engine's thread.

    `opened` gets the model once it can be used, `happened` the events of a call, `failed` the sentence of an error
    after which the thread ends.
    """

    opened: Callable[[OpenedT], object]
    happened: Callable[[Sequence[Event]], object]
    failed: Callable[[str], object]


class EngineThread(Generic[OpenedT]):
    """One model and the scheduler of its slots, in a thread of their own."""

    def __init__(
        self, open_model: Callable[[], OpenedT], settings: SchedulerSettings, watcher: Watcher[OpenedT]
    ) -> None:
        self._open_model = open_model
        self._settings = settings
        self._watcher = watcher
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._scheduler: Scheduler | None = None
        self._ending = False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to open the model."""
        self._thread.start()

    def silent_seconds(self) -> float:
        """How long ago the thread last showed that it is alive; infinite if it has ended."""
        return time.monotonic() - self._beat if self._thread.is_alive() else float("inf")

    def submit(self, request: Request) -> None:
        """Let a request run; if the scheduler refuses it, its choices fail."""
        self._commands.put(lambda: self._submit(request))

    def cancel(self, request_id: RequestId, choice: int | None = None) -> None:
        """End a request, or one choice of it, before the next call."""

        def run() -> None:
            if self._scheduler is not None:
                self._scheduler.cancel(request_id, choice)

        self._commands.put(run)

    def call(self, function: Callable[[], Result], done: Callable[[Result | Exception], object]) -> None:
        """Call a function between two calls of the model; `done` gets its result, or what it raised."""

        def run() -> None:
            try:
                result: Result | Exception = function()
            except Exception as error:  # belongs to whoever asked
                result = error
            done(result)

        self._commands.put(run)

    def statistics(self) -> Statistics:
        """What the scheduler has counted; zeros until there is one."""
        return Statistics() if self._scheduler is None else self._scheduler.statistics

    def slots(self) -> Sequence[SlotView]:
        """What each slot holds; only for functions that `call` calls."""
        return () if self._scheduler is None else self._scheduler.view()

    def end(self, seconds: float) -> None:
        """Let the thread end after the call that it is making; waits at most so long."""
        self._ending = True
        self._commands.put(lambda: None)
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            opened = self._open_model()
            if opened.slots is not None:
                self._scheduler = Scheduler(opened.slots, self._settings, time.perf_counter)
            self._watcher.opened(opened)
            while not self._ending:
                self._beat = time.monotonic()
                self._obey()
                if self._scheduler is not None and self._scheduler.has_work and (events := self._scheduler.turn()):
                    self._watcher.happened(events)
        except UserError as error:
            self._watcher.failed(str(error))
        except BaseException as error:  # nobody else sees what ends this thread
            traceback.print_exc()
            self._watcher.failed(f"the engine has failed: {type(error).__name__}: {error}")

    def _obey(self) -> None:
        """Carry out all commands; without any other work, wait for the first."""
        busy = self._scheduler is not None and self._scheduler.has_work
        try:
            command = self._commands.get(block=not busy, timeout=IDLE_BEAT)
            while True:
                command()
                self._beat = time.monotonic()
                command = self._commands.get(block=False)
        except queue.Empty:
            return

    def _submit(self, request: Request) -> None:
        try:
            assert self._scheduler is not None, "requests come after the model"
            self._scheduler.submit(request)
        except UserError as error:
            self._watcher.happened(
                [Failed(request.request_id, str(error), choice=choice) for choice in range(request.choices)]
            )
