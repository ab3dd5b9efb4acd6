"""The OpenAPI file, made from the very types that parse the requests.

OpenAPI 3.1: https://spec.openapis.org/oas/v3.1.0.html. It has no place for the type of an event. The schema of a stream
therefore describes each event, as tools expect it that know the `itemSchema` of version 3.2.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from runtime.server.http.endpoint import Endpoint
from runtime.server.http.gate import OPEN_PATHS
from runtime.server.http.request_ids import HEADER

REFERENCE = "#/components/schemas/{name}"
JSON = "application/json"
EVENTS = "text/event-stream"
END_OF_EVENTS = "[DONE]"
PATH_PARAMETER = re.compile(r"\{(?P<name>\w+)(:\w+)?\}")
DESCRIPTION = (
    "Fields that are not listed are refused. A failure's body has an `error` with a sentence, and for programs a "
    "`code`; in a stream it is the last event. An API key is needed where the server was given a file of keys."
)
EVERYWHERE = (421, 500)
OF_BODIES = (400, 408, 413, 415)
OF_KEYS = 401
REASONS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body has not come in time.",
    413: "The body is larger than the server takes.",
    415: "The body's content type is not application/json.",
    421: "The server is not called by this name.",
    429: "No more requests may wait; Retry-After says when to try again.",
    500: "The server has failed.",
    503: "The model is being loaded, the server ends, or the model has failed; Retry-After says when to try again.",
    504: "The request took longer than the server allows.",
}
RETRIED = (429, 503)  # statuses that have Retry-After
OTHERS = "Not now; the answer says why."


def openapi_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI file of these endpoints."""
    kinds = [kind for kind in _types(endpoints) if not isinstance(kind, str)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REFERENCE)
    references = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = PATH_PARAMETER.sub(r"{\g<name>}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "A model's server", "version": "1", "description": DESCRIPTION},
        "paths": paths,
        "security": [{"key": []}, {}],
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _types(endpoints: Sequence[Endpoint]) -> list[Any]:
    """Each type of a request, an answer or an event once."""
    found: list[Any] = []
    for each in endpoints:
        found += [each.asks, each.gives, each.error, *each.events, *each.other_answers.values()]
    return [kind for kind in dict.fromkeys(found) if kind is not None]


def _operation(endpoint: Endpoint, references: Mapping[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": _responses(endpoint, references)}
    names = [match["name"] for match in PATH_PARAMETER.finditer(endpoint.path)]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if endpoint.asks is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": references[endpoint.asks]}}}
    if endpoint.path in OPEN_PATHS:
        operation["security"] = []
    return operation


def _responses(endpoint: Endpoint, references: Mapping[Any, Any]) -> dict[str, Any]:
    if isinstance(endpoint.gives, str):
        content: dict[str, Any] = {endpoint.gives: {"schema": {"type": "string"}}}
    else:
        content = {JSON: {"schema": references[endpoint.gives]}}
    if endpoint.events:
        kinds = dict.fromkeys((*endpoint.events, endpoint.error))
        content[EVENTS] = {"schema": _event([references[kind] for kind in kinds])}
    responses = {"200": _response(endpoint.summary, content)}
    for status in _failures(endpoint):
        failure = {JSON: {"schema": references[endpoint.error]}}
        responses[str(status)] = _response(REASONS[status], failure, retried=status in RETRIED)
    for status, kind in endpoint.other_answers.items():
        responses[str(status)] = _response(OTHERS, {JSON: {"schema": references[kind]}})
    return responses


def _event(schemas: Sequence[Any]) -> dict[str, Any]:
    """The schema of one server-sent event, whose data is JSON of one of these schemas, or the end."""
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": schemas}}
    return {"type": "object", "properties": {"data": {"anyOf": [{"const": END_OF_EVENTS}, data]}}, "required": ["data"]}


def _failures(endpoint: Endpoint) -> list[int]:
    """Statuses of its errors, in order."""
    found = {*EVERYWHERE, *endpoint.failures}
    found |= set(OF_BODIES) if endpoint.asks is not None else set()
    found |= {OF_KEYS} if endpoint.path not in OPEN_PATHS else set()
    return sorted(found)


def _response(what: str, content: Mapping[str, Any], *, retried: bool = False) -> dict[str, Any]:
    headers = {HEADER: {"description": "The request's id.", "schema": {"type": "string"}}}
    if retried:
        headers["Retry-After"] = {"description": "Seconds until a new try.", "schema": {"type": "integer"}}
    return {"description": what, "headers": headers, "content": content}
