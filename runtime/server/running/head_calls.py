"""Texts on their way through a head that generates none: whether there is a place for one, and its outputs.

Everything here runs in the event loop's thread but the calls of the model.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import numpy as np

from runtime.decoding.whole_texts import HeadModel, Outputs
from runtime.errors import UserError
from runtime.scheduling.statistics import Statistics
from runtime.server.http.failures import broken, refused
from runtime.server.running.generations import ABORTED, Times
from runtime.server.running.places import check_place
from runtime.server.settings import ServerSettings

RETRY_AFTER = 1  # seconds; one text is one call of the model, so that a place is soon free


class CallModel(Protocol):
    """Calls a function in the engine's thread, unless whoever awaits the result has gone before its turn."""

    def __call__(self, function: Callable[[], Outputs]) -> Awaitable[Outputs]:
        """The function's result."""


class HeadCalls:
    """All texts that wait for a head. `over` is called with each that is over, its tokens, and the reason."""

    def __init__(self, settings: ServerSettings, call: CallModel, over: Callable[[Times, int, str], object]) -> None:
        self._settings = settings
        self._call = call
        self._over = over
        self._tokens: list[int] = []  # of each text that is not over
        self._computed = 0
        self.running = 0
        self.finished = 0

    @property
    def waiting(self) -> int:
        """Texts that the model is not working on."""
        return max(len(self._tokens) - 1, 0)

    @property
    def queued_tokens(self) -> int:
        """Tokens of all texts that are not over."""
        return sum(self._tokens)

    def statistics(self) -> Statistics:
        """What was done, as a scheduler counts it."""
        return Statistics(prompt_tokens=self._computed, waiting=self.waiting, running=min(len(self._tokens), 1))

    def check_place(self, texts: int, tokens: int = 0) -> None:
        """Raise `RequestFailure` unless so many more texts, with so many tokens in all, may wait."""
        check_place(self._settings, self, texts, tokens, lambda: RETRY_AFTER)

    async def outputs(self, model: HeadModel, texts: Sequence[Sequence[int]]) -> list[Outputs]:
        """The head's outputs for the ids of each text; cancelling ends the work after at most one more text.

        Raises `RequestFailure` if there is no place for them, if one does not fit the model, if they take too long, and
        if a number is infinite or NaN.
        """
        lengths = [len(ids) for ids in texts]
        self.check_place(len(texts), sum(lengths))
        self._tokens += lengths
        self.running += 1
        left = list(lengths)
        seconds = self._settings.request_seconds
        found = []
        arrived = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                for ids in texts:
                    found.append(await self._one(model, ids, arrived))
                    self._tokens.remove(left.pop(0))
        except TimeoutError as error:
            raise broken(
                f"the request took longer than {seconds:g} s, the server's limit", status=504, code="timeout"
            ) from error
        finally:
            for length in left:
                self._tokens.remove(length)
            self.running -= 1
            self.finished += 1
        return found

    async def _one(self, model: HeadModel, ids: Sequence[int], arrived: float) -> Outputs:
        times, reason = Times(arrived), ABORTED

        def call() -> Outputs:
            times.started = time.monotonic()
            return model.head_outputs(ids)

        try:
            outputs = await self._call(call)
            if not np.isfinite(outputs).all():
                raise broken(
                    "the model's outputs hold nan or infinity; check the artifact with `python -m runtime.verify`"
                )
            self._computed += len(ids)
            reason = "stop"
            return outputs
        except UserError as error:
            reason = "error"
            raise refused(str(error), param="input", code="context_length_exceeded") from error
        except Exception:
            reason = "error"
            raise
        finally:
            times.ended = time.monotonic()
            self._over(times, len(ids), reason)
