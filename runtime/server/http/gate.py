"""What every request passes: its id, the keys, the names of hosts, errors as JSON, the log."""

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.converters.messages_output import error_of
from runtime.server.http.bodies import json_answer
from runtime.server.http.event_stream import ClientLeftError
from runtime.server.http.failures import RequestFailure, broken, unavailable
from runtime.server.http.request_ids import HEADER, current_request_id, request_id_of
from runtime.server.http.request_log import LogLine, current_line, write_to_stderr
from runtime.server.settings import LOOPBACK_NAMES, Keys

# what a load balancer asks, and the page, which then asks for a key
OPEN_PATHS = frozenset({"/health", "/ready", "/"})
PROBES = frozenset({"/health", "/ready"})  # asked each second by gateways; the log tells only of what is not well
ANTHROPIC_PATHS = ("/v1/messages",)  # where bodies of errors and the id of a request are as its clients expect
ANTHROPIC_HEADER = "request-id"
ENDED_RETRY = 5  # seconds
CLIENT_LEFT = 499  # nginx's status for the log; no client sees it


class Gate:
    """An ASGI application in front of another."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        hosts: frozenset[str] | None,
        log: Callable[[LogLine], object] = write_to_stderr,
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get(HEADER))
        token = current_request_id.set(request_id)
        line = LogLine(time.time(), request_id, scope["method"], scope["path"])
        line_token = current_line.set(line)
        start = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                line.status = message["status"]
                written = MutableHeaders(raw=message["headers"])
                written[HEADER] = request_id
                if scope["path"].startswith(ANTHROPIC_PATHS):
                    written[ANTHROPIC_HEADER] = request_id
            await send(message)

        try:
            await self._pass(scope, headers, receive, send_with_id, line)
        finally:
            line.seconds = round(time.monotonic() - start, 6)
            if scope["path"] not in PROBES or line.status != 200:
                self._log(line)
            current_request_id.reset(token)
            current_line.reset(line_token)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send, line: LogLine) -> None:
        try:
            self._check(scope["path"], headers)
            await self._app(scope, receive, send)
        except ClientLeftError:
            line.error = "the client has left"
            line.status = line.status or CLIENT_LEFT
        except RequestFailure as failure:
            await self._refuse(failure, scope, receive, send, line)
        except asyncio.CancelledError:  # as uvicorn ends those who have not ended in time, such as endless bodies
            ended = unavailable("the server has ended before the request", code="draining", retry_after=ENDED_RETRY)
            await self._refuse(ended, scope, receive, send, line)
        except Exception as error:
            line.error = f"{type(error).__name__}: {error}"
            if not line.status:
                unforeseen = broken(f"an error in the server; its log tells more (request {line.request_id})")
                await json_answer(_body(scope["path"], unforeseen), unforeseen.status)(scope, receive, send)
            raise

    async def _refuse(self, failure: RequestFailure, scope: Scope, receive: Receive, send: Send, line: LogLine) -> None:
        """Answer with an error, unless an answer has begun."""
        line.error = failure.body.error.message
        if not line.status:
            answer = json_answer(_body(scope["path"], failure), failure.status)
            answer.headers.update(failure.headers)
            await answer(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host")  # HTTP/1.0, which some load balancers speak and no browser does, has none
        if self._hosts is not None and host is not None and _host_name(host) not in self._hosts:
            raise RequestFailure(
                421,
                f"this server is not called {host!r}; add the name to allowed_hosts if it is meant to be",
                code="wrong_host",
            )
        if self._keys is None or path in OPEN_PATHS:
            return
        if not self._known(headers):
            raise RequestFailure(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _known(self, headers: Headers) -> bool:
        """Whether a header holds one of the keys, compared in constant time."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        assert self._keys is not None
        found = [hmac.compare_digest(given.encode("latin-1", "replace"), key) for key in self._keys.keys]
        return any(found)


def _body(path: str, failure: RequestFailure) -> object:
    """The body of an error, in the form of the API that the address belongs to."""
    return error_of(failure) if path.startswith(ANTHROPIC_PATHS) else failure.body


def _host_name(host: str) -> str:
    """A Host header without its port, in lower case."""
    name = host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.strip("[]").lower()


def allowed_hosts(names: Sequence[str], only_here: str | None) -> frozenset[str] | None:
    """The names by which a server may be called; None for any.

    only_here: the host at which only this machine reaches the server; None if others do.

    A server that only this machine reaches is called by this machine's names alone: a page of another site whose name
    has been pointed at it (DNS rebinding) is refused.
    """
    if only_here is None and not names:
        return None
    own = () if only_here is None else (only_here,)
    return LOOPBACK_NAMES | {name.lower() for name in (*own, *names)}
