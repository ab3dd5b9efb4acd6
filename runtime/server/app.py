"""The application: which function answers which address."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.api import responses as responses_api
from runtime.server.api.chat import ChatChunk, ChatRequest, ChatResponse
from runtime.server.api.common import ModelCard, ModelList
from runtime.server.api.completions import CompletionRequest, CompletionResponse
from runtime.server.api.heads import ClassifyRequest, ClassifyResponse, EmbeddingRequest, EmbeddingResponse
from runtime.server.api.messages import CountRequest, CountResponse, MessagesRequest
from runtime.server.api.messages import Error as MessagesError
from runtime.server.api.messages import Event as MessagesEvent
from runtime.server.api.messages import Reply as MessagesResponse
from runtime.server.api.response_events import Event as ResponsesEvent
from runtime.server.api.status import Health, SlotsResponse
from runtime.server.api.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
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
from runtime.server.http.bodies import json_answer
from runtime.server.http.endpoint import Answer, Endpoint, WithBody
from runtime.server.http.failures import RequestFailure, no_such_address, wrong_method
from runtime.server.http.gate import Gate, allowed_hosts
from runtime.server.http.openapi import openapi_document
from runtime.server.http.request_log import LogLine, write_to_stderr
from runtime.server.service import Service
from runtime.server.settings import Keys

GENERATING = (404, 429, 503, 504)  # statuses of failures where a model generates
USING = (404, 503)  # where it is used otherwise


async def openapi(_service: Service, _request: Request) -> Response:
    """The OpenAPI file."""
    return json_answer(openapi_document(ENDPOINTS))


ENDPOINTS: Sequence[Endpoint] = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        "Answers to a conversation, whole or as a stream.",
        WithBody(ChatRequest, chat.answer),
        ChatResponse,
        ChatChunk,
        GENERATING,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        "Texts that continue prompts, whole or as a stream.",
        WithBody(CompletionRequest, completions.answer),
        CompletionResponse,
        CompletionResponse,
        GENERATING,
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        "An answer in the form of OpenAI's Responses API.",
        WithBody(responses_api.ResponsesRequest, responses.answer),
        responses_api.Response,
        ResponsesEvent,
        GENERATING,
    ),
    Endpoint(
        "POST",
        "/v1/messages",
        "An answer in the form of Anthropic's Messages API.",
        WithBody(MessagesRequest, messages.answer),
        MessagesResponse,
        MessagesEvent,
        GENERATING,
        error=MessagesError,
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        "How many tokens a conversation has.",
        WithBody(CountRequest, messages.count),
        CountResponse,
        failures=USING,
        error=MessagesError,
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        "A vector for each text.",
        WithBody(EmbeddingRequest, embeddings.answer),
        EmbeddingResponse,
        failures=GENERATING,
    ),
    Endpoint(
        "POST",
        "/classify",
        "Labels of texts or of their tokens, or the answer to a question.",
        WithBody(ClassifyRequest, classification.answer),
        ClassifyResponse,
        failures=GENERATING,
    ),
    Endpoint("GET", "/v1/models", "The models that can be asked for.", status.models, ModelList),
    Endpoint("GET", "/v1/models/{name:path}", "One model.", status.model, ModelCard, failures=(404,)),
    Endpoint(
        "POST",
        "/tokenize",
        "Token ids of a text or a conversation.",
        WithBody(TokenizeRequest, tokens.tokenize),
        TokenizeResponse,
        failures=USING,
    ),
    Endpoint(
        "POST",
        "/detokenize",
        "The text of token ids.",
        WithBody(DetokenizeRequest, tokens.detokenize),
        DetokenizeResponse,
        failures=USING,
    ),
    Endpoint("GET", "/health", "Whether the server works.", status.health, Health, other_answers={503: Health}),
    Endpoint("GET", "/ready", "Whether the server takes requests.", status.ready, Health, other_answers={503: Health}),
    Endpoint("GET", "/metrics", "Measurements in Prometheus' text format.", status.metrics, status.METRICS_TYPE),
    Endpoint("GET", "/slots", "What the server does now.", status.slots, SlotsResponse),
    Endpoint("GET", "/", "The page to chat.", page.answer, "text/html"),
    Endpoint("GET", "/openapi.json", "This file.", openapi, dict[str, Any]),
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
    hosts = allowed_hosts(settings.allowed_hosts, settings.host if settings.only_this_machine else None)
    return Gate(Router(routes, redirect_slashes=False, default=_no_such_address), keys, hosts, log)


class _Address:
    """The ASGI application of one address."""

    def __init__(self, service: Service, answers: Mapping[str, Answer]) -> None:
        self._service = service
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; raises `RequestFailure`, which is counted here and answered by the gate."""
        try:
            await self._answer(scope, receive, send)
        except RequestFailure as failure:
            self._service.metrics.refused(failure.status)
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in self._answers:
            raise wrong_method(scope["path"], method, self._answers)
        response = await self._answers[method](self._service, Request(scope, receive))
        await response(scope, receive, send)


async def _no_such_address(scope: Scope, _receive: Receive, _send: Send) -> None:
    raise no_such_address(scope["path"])
