"""One row of the table of addresses: what answers it, and the types of its requests and answers."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Generic, TypeVar, get_args

from starlette.requests import Request
from starlette.responses import Response

from runtime.server.http.bodies import read_request
from runtime.server.http.failures import ErrorBody
from runtime.server.http.request_log import current_line
from runtime.server.service import Service

Asked = TypeVar("Asked")
Answer = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True)
class WithBody(Generic[Asked]):
    """Answers a request whose body is JSON of the type `kind`."""

    kind: type[Asked]
    answer: Callable[[Service, Request, Asked], Awaitable[Response]]

    async def __call__(self, service: Service, request: Request) -> Response:
        """Answer a request; raises `RequestFailure` for a body that does not fit."""
        settings = service.settings
        asked = await read_request(request, self.kind, settings.max_body_bytes, settings.request_seconds)
        if (line := current_line.get()) is not None:
            line.asked(asked)
        return await self.answer(service, request, asked)


@dataclass(frozen=True)
class Endpoint:
    """An address and its method.

    answer: what answers it; `WithBody` where requests have a body.
    gives: the type of a JSON answer, or the media type of another.
    event: the type of the events of a stream, where there are streams; a union where there are several.
    error: the type of its errors.
    failures: statuses of its errors beside those that every address has.
    other_answers: answers with other statuses that are no errors, by type.
    """

    method: str
    path: str
    summary: str
    answer: Answer
    gives: Any
    event: Any = None
    failures: tuple[int, ...] = ()
    other_answers: Mapping[int, Any] = field(default_factory=dict)
    error: Any = ErrorBody

    @property
    def events(self) -> tuple[Any, ...]:
        """The types of the events of its streams."""
        if self.event is None:
            return ()
        return get_args(self.event) if isinstance(self.event, UnionType) else (self.event,)

    @property
    def asks(self) -> type | None:
        """The type of its requests' bodies; None where there are none."""
        return self.answer.kind if isinstance(self.answer, WithBody) else None
