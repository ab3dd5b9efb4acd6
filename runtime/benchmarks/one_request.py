"""A request that a scheduler serves alone, for what times it."""

from collections.abc import Iterator

from runtime.errors import UserError
from runtime.scheduling.requests import Event, Failed, Request
from runtime.scheduling.scheduler import Scheduler


def events_of(scheduler: Scheduler, request: Request) -> Iterator[Event]:
    """Submit a request and yield its events as they happen; raises `UserError` if it fails."""
    scheduler.submit(request)
    while scheduler.has_work:
        for event in scheduler.turn():
            if isinstance(event, Failed):
                raise UserError(event.error)
            yield event
