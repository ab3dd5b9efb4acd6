"""What the server says of itself: whether it lives, takes requests, and what it does."""

from starlette.requests import Request
from starlette.responses import Response

from runtime.server.api.common import ModelCard, ModelList
from runtime.server.api.status import (
    Percentiles,
    PrefixCacheCounts,
    RequestCounts,
    SlotsResponse,
    SlotState,
)
from runtime.server.http.bodies import json_answer
from runtime.server.http.failures import RequestFailure
from runtime.server.service import Service

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def health(service: Service, _request: Request) -> Response:
    """200 while the server works, also while it loads or drains; 503 if the engine has failed or hangs."""
    found = service.health()
    return json_answer(found, 503 if found.status == "failed" else 200)


async def ready(service: Service, _request: Request) -> Response:
    """200 while requests are to be sent here, otherwise 503; one that is ending may take some more."""
    found = service.health()
    return json_answer(found, 200 if found.status == "ready" else 503)


async def metrics(service: Service, _request: Request) -> Response:
    """Measurements in Prometheus' text format."""
    return Response(service.metrics.text(), media_type=METRICS_TYPE)


async def models(service: Service, _request: Request) -> Response:
    """The one model, in a list."""
    return json_answer(ModelList("list", [_card(service)]))


async def model(service: Service, request: Request) -> Response:
    """The one model; raises `RequestFailure` for another name."""
    name = request.path_params["name"]
    if name != service.name:
        message = f"the model {name!r} is not here, expected {service.name!r}"
        raise RequestFailure(404, message, param="model", code="model_not_found")
    return json_answer(_card(service))


def _card(service: Service) -> ModelCard:
    return ModelCard(service.name, "model", service.created, "local", service.capacity)


async def slots(service: Service, _request: Request) -> Response:
    """What each slot does, and how fast the server is."""
    return json_answer(await slots_of(service))


async def slots_of(service: Service) -> SlotsResponse:
    """What each slot of a service does, and how fast it is."""
    generated, prompt = service.metrics.rates()
    counts, views = service.statistics(), await service.slots()
    return SlotsResponse(
        service.name,
        service.health().status,
        service.uptime,
        [
            SlotState(
                view.slot,
                view.state,
                view.tokens,
                None if view.request_id is None else service.generations.label(view.request_id),
            )
            for view in views
        ],
        service.waiting,
        service.queued_tokens,
        generated,
        prompt,
        Percentiles(service.metrics.ttft(0.5), service.metrics.ttft(0.99)),
        PrefixCacheCounts(counts.prefix_queries, counts.prefix_hits),
        RequestCounts(service.running, service.finished),
    )
