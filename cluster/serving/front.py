"""The front: takes requests under one address, chooses the model, and relays each to a replica of it."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serving.affinity import affinity_key
from cluster.serving.overview import Overview
from cluster.serving.proxied import without_second_id
from cluster.serving.relay import RelayedRequest
from cluster.serving.way_back import WayBack, failure_of
from runtime.server.api.status import Health
from runtime.server.app import ENDPOINTS
from runtime.server.endpoints.page import page_answer
from runtime.server.endpoints.status import METRICS_TYPE
from runtime.server.http.bodies import json_answer, read_body
from runtime.server.http.event_stream import ClientLeftError
from runtime.server.http.failures import RequestFailure, no_such_address, refused, wrong_method
from runtime.server.http.gate import Gate
from runtime.server.http.openapi import openapi_document
from runtime.server.http.request_ids import HEADER, current_request_id
from runtime.server.settings import Keys

CANCELLING_SECONDS = 0.5  # within which Ray cancels all that belongs to a request
LATE_SECONDS = 1.0  # beyond `request_seconds`, so that a replica which has the request tells of its limit first
RELAYED = frozenset(endpoint.path for endpoint in ENDPOINTS if endpoint.method == "POST")
MODEL_PATH = "/v1/models/"
OWN_HEADERS = frozenset({b"host", b"authorization", b"x-api-key", HEADER.encode()})  # which are not relayed
HANDLE_OPTIONS = {
    "stream": True,
    "_by_reference": False,  # pieces come by gRPC, not through the object store
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}


class FrontSettings(msgspec.Struct, frozen=True):
    """The settings of a front; see `ClusterSettings`."""

    keys_file: str | None
    allowed_hosts: tuple[str, ...]
    max_body_bytes: int
    request_seconds: float


class Front:
    """Checks keys, hosts and sizes as one box does, and keeps nothing but the requests on their way."""

    def __init__(self, models: Mapping[str, DeploymentHandle], settings: FrontSettings) -> None:
        self._settings = settings
        self._overview = Overview(models)
        self._answers = {
            name: handle.options(method_name="answer", **HANDLE_OPTIONS) for name, handle in models.items()
        }
        self._own: Mapping[str, Callable[[], Awaitable[Response]]] = {
            "/": self._page,
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/replicas": self._replicas,
            "/slots": self._slots,
            "/openapi.json": self._openapi,
            "/v1/models": self._models,
        }

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, which Ray Serve asks for."""
        keys = None if self._settings.keys_file is None else Keys.read(Path(self._settings.keys_file))
        hosts = frozenset(name.lower() for name in self._settings.allowed_hosts) or None
        return without_second_id(Gate(self._answer, keys, hosts))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._routed(scope, receive, send)
        except asyncio.CancelledError as error:
            if await _is_to_end():  # by Ray, once the client has left
                raise ClientLeftError from error
            raise

    async def _routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["method"] == "POST" and scope["path"] in RELAYED:
            await self._relay(Request(scope, receive), send)
        elif scope["method"] in ("GET", "HEAD") and scope["path"] in self._own:
            await (await self._own[scope["path"]]())(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD") and scope["path"].startswith(MODEL_PATH):
            await (await self._model(scope["path"].removeprefix(MODEL_PATH)))(scope, receive, send)
        elif scope["path"] in RELAYED or scope["path"] in self._own:
            raise wrong_method(scope["path"], scope["method"], ["POST" if scope["path"] in RELAYED else "GET"])
        else:
            raise no_such_address(scope["path"])

    async def _relay(self, request: Request, send: Send) -> None:
        body = await read_body(request, self._settings.max_body_bytes, self._settings.request_seconds)
        asked = _fields(body)
        name = self._model_of(asked)
        way_back = WayBack(request.scope["path"], send)
        answer = self._answers[name].remote(_relayed(request, body, affinity_key(asked)))
        try:
            async with asyncio.timeout(self._settings.request_seconds + LATE_SECONDS) as limit:
                async for messages in answer:
                    limit.reschedule(None)  # the replica itself ends an answer that takes too long
                    await way_back.send(messages)
        except Exception as error:
            print(f"request {current_request_id.get()}: {type(error).__name__}: {error}", file=sys.stderr)
            if limit.expired():
                _cancel(answer)
            await way_back.fail(failure_of(error, name))

    def _model_of(self, asked: Mapping[str, object]) -> str:
        """The model of a request; with a single one, its replica says what is wrong with the name."""
        name = asked.get("model")
        if len(self._answers) == 1:
            return next(iter(self._answers))
        if not isinstance(name, str):
            names = ", ".join(self._answers)
            raise refused(f"the field model is missing, expected one of {names}", param="model", code="missing_field")
        return self._known(name)

    def _known(self, name: str) -> str:
        if name not in self._answers:
            names = ", ".join(self._answers)
            message = f"the model {name!r} is not here, expected one of {names}"
            raise RequestFailure(404, message, param="model", code="model_not_found")
        return name

    async def _page(self) -> Response:
        return page_answer()

    async def _openapi(self) -> Response:
        return json_answer(openapi_document(ENDPOINTS))

    async def _health(self) -> Response:
        return json_answer(Health("ready"))

    async def _ready(self) -> Response:
        without = [state.model for state in await self._overview.states() if not state.replicas]
        if without:
            return json_answer(Health("loading", f"no replica of {', '.join(without)} answers"), 503)
        return json_answer(Health("ready"))

    async def _metrics(self) -> Response:
        return Response(await self._overview.metrics(), media_type=METRICS_TYPE)

    async def _replicas(self) -> Response:
        return json_answer(await self._overview.states())

    async def _slots(self) -> Response:
        return json_answer(await self._overview.slots())

    async def _models(self) -> Response:
        return json_answer(await self._overview.cards())

    async def _model(self, name: str) -> Response:
        self._known(name)
        return json_answer(next(card for card in (await self._overview.cards()).data if card.id == name))


async def _is_to_end() -> bool:
    """Whether this task was cancelled, and not only what it waited for; Ray cancels both, the second one first."""
    task = asyncio.current_task()
    assert task is not None
    if not task.cancelling():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(CANCELLING_SECONDS)
    return task.cancelling() > 0


def _cancel(answer: DeploymentResponseGenerator[list[Message]]) -> None:
    """Tell the replica, which would go on to the end; Ray raises here what the answer has ended with, if it has."""
    with suppress(Exception):
        answer.cancel()


def _fields(body: bytes) -> Mapping[str, object]:
    """The fields of a body; none if it is not as it should be, which the replica then says."""
    try:
        return msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _relayed(request: Request, body: bytes, affinity: str) -> RelayedRequest:
    headers = tuple((name, value) for name, value in request.headers.raw if name.lower() not in OWN_HEADERS)
    own = (HEADER.encode(), current_request_id.get().encode())
    return RelayedRequest(
        request.method, request.scope["path"], request.scope["query_string"], (*headers, own), None, body, affinity
    )


async def _live(receive: Receive, send: Send) -> None:
    """Answer Ray Serve, which asks an application whether it has started and ended."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
