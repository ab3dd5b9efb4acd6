"""The application: which function answers which address."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.endpoints import (
    chat,
    classification,
    completions,
    embeddings,
    messages,
    page,
    responses,
    status,
    tokens,
)
from runtime.server.failures import RequestFailure
from runtime.server.gate import Gate, LogLine, allowed_hosts, write_to_stderr
from runtime.server.service import Service
from runtime.server.settings import Keys

Answer = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """An address, its method, and what answers it."""

    method: str
    path: str
    answer: Answer


ENDPOINTS: Sequence[Endpoint] = (
    Endpoint("POST", "/v1/chat/completions", chat.answer),
    Endpoint("POST", "/v1/completions", completions.answer),
    Endpoint("POST", "/v1/responses", responses.answer),
    Endpoint("POST", "/v1/messages", messages.answer),
    Endpoint("POST", "/v1/messages/count_tokens", messages.count),
    Endpoint("POST", "/v1/embeddings", embeddings.answer),
    Endpoint("POST", "/classify", classification.answer),
    Endpoint("GET", "/v1/models", status.models),
    Endpoint("GET", "/v1/models/{name:path}", status.model),
    Endpoint("POST", "/tokenize", tokens.tokenize),
    Endpoint("POST", "/detokenize", tokens.detokenize),
    Endpoint("GET", "/health", status.health),
    Endpoint("GET", "/ready", status.ready),
    Endpoint("GET", "/metrics", status.metrics),
    Endpoint("GET", "/slots", status.slots),
    Endpoint("GET", "/", page.answer),
)


def application(
    service: Service, keys: Keys | None = None, log: Callable[[LogLine], object] = write_to_stderr
) -> ASGIApp:
    """The ASGI application of a service; each request gets a line of the log."""
    paths = dict.fromkeys(endpoint.path for endpoint in ENDPOINTS)
    routes = [
        Route(path, _Address(service, {each.method: each.answer for each in ENDPOINTS if each.path == path}))
        for path in paths
    ]
    settings = service.settings
    hosts = allowed_hosts(settings.allowed_hosts, only_this_machine=settings.only_this_machine)
    return Gate(Router(routes, redirect_slashes=False, default=_no_such_address), keys, hosts, log)


class _Address:
    """The ASGI application of one address."""

    def __init__(self, service: Service, answers: Mapping[str, Answer]) -> None:
        self._service = service
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; raises `RequestFailure`, which the gate answers."""
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in self._answers:
            allowed = ", ".join(self._answers)
            raise RequestFailure(
                405, f"{scope['path']} is not for {method}, expected {allowed}", headers={"Allow": allowed}
            )
        response = await self._answers[method](self._service, Request(scope, receive))
        await response(scope, receive, send)


async def _no_such_address(scope: Scope, _receive: Receive, _send: Send) -> None:
    raise RequestFailure(404, f"{scope['path']} is not an address here; /openapi.json lists those that are")
