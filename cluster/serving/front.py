"""The front: takes requests under one address, chooses the model, and relays each to a replica of it."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.serving.affinity import affinity_key
from cluster.serving.overview import Overview
from cluster.serving.relay import RelayedRequest
from cluster.serving.way_back import WayBack
from runtime.server.api.status import Health
from runtime.server.app import ENDPOINTS
from runtime.server.endpoints.page import page_answer
from runtime.server.endpoints.status import METRICS_TYPE
from runtime.server.http.bodies import json_answer, read_body
from runtime.server.http.failures import RequestFailure, no_such_address, refused, too_busy, unavailable, wrong_method
from runtime.server.http.gate import Gate
from runtime.server.http.openapi import openapi_document
from runtime.server.http.request_ids import HEADER, current_request_id
from runtime.server.settings import Keys

FULL_RETRY = 2  # seconds
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
        return Gate(self._answer, keys, hosts)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        relayed = _relayed(request, body, affinity_key(asked))
        way_back = WayBack(request.url.path, send)
        try:
            async with asyncio.timeout(self._settings.request_seconds) as limit:
                async for messages in self._answers[name].remote(relayed):
                    limit.reschedule(None)  # the replica itself ends an answer that takes too long
                    await way_back.send(messages)
        except BackPressureError as error:
            raise too_busy(f"every replica of {name!r} is full; try again later", FULL_RETRY) from error
        except TimeoutError as error:
            message = f"no replica of {name!r} was free in time; try again later"
            raise unavailable(message, code="timeout", retry_after=FULL_RETRY) from error
        except (RayError, RayServeException) as error:
            print(f"request {current_request_id.get()}: {error}", file=sys.stderr)
            await way_back.lost(name)

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
        request.method, request.url.path, request.scope["query_string"], (*headers, own), None, body, affinity
    )


async def _live(receive: Receive, send: Send) -> None:
    """Answer Ray Serve, which asks an application whether it has started and ended."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
