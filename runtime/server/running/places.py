"""Whether a request may wait for the model."""

from collections.abc import Callable
from typing import Protocol

from runtime.server.http.failures import too_busy
from runtime.server.settings import ServerSettings


class Queue(Protocol):
    """What waits for the model."""

    @property
    def waiting(self) -> int:
        """Sequences that the model does not hold yet."""

    @property
    def queued_tokens(self) -> int:
        """Their prompt tokens."""


def check_place(
    limits: ServerSettings,
    queue: Queue,
    sequences: int,
    tokens: int,
    retry_after: Callable[[], int],
    free: int = 0,
) -> None:
    """Raise `RequestFailure` unless so many more sequences, with so many tokens in all, may wait.

    One request may always wait by itself, however long it is, and so may as many as the model has `free` places for. A
    client that is refused is told to come back after `retry_after()` seconds.
    """
    if queue.waiting and queue.waiting + sequences > limits.max_queued + free:
        raise too_busy(
            f"{queue.waiting} sequences wait already, and at most {limits.max_queued} may; try again later",
            retry_after(),
        )
    if queue.waiting and queue.queued_tokens + tokens > limits.max_queued_tokens:
        raise too_busy(
            f"{queue.queued_tokens} prompt tokens wait already, and at most {limits.max_queued_tokens} may; "
            "try again later",
            retry_after(),
        )
