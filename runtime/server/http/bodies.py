"""Bodies of requests and answers: JSON, parsed strictly into types."""

import asyncio
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from runtime.server.http.event_stream import ClientLeftError
from runtime.server.http.failures import RequestFailure, refused

Parsed = TypeVar("Parsed")
UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*?)`", re.DOTALL)
PLACE = re.compile(r" - at `(?P<path>[^`]*)`$")
LONGEST_REASON = 300  # characters of what is wrong with a body


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body; raises `RequestFailure` for one of more than `most` bytes, before it is in memory.

    So it does if the body has not come after so many seconds.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdecimal() and (len(declared) > 15 or int(declared) > most):
        raise _too_large(most)
    parts, length = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                length += len(part)
                if length > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError as error:
        message = f"the body has not come within {seconds:g} s, the server's limit; send it again"
        raise RequestFailure(408, message, code="timeout", headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise ClientLeftError from error
    return b"".join(parts)


def _too_large(most: int) -> RequestFailure:
    message = f"the body has more than {most} bytes, the server's limit; send less"
    return RequestFailure(413, message, code="body_too_large", headers={"Connection": "close"})


async def read_request(request: Request, kind: type[Parsed], most: int, seconds: float) -> Parsed:
    """The body as `kind`; raises `RequestFailure` for another content type, and for a body that does not fit.

    JSON alone is taken, since a browser asks before it sends that to another site.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestFailure(
            415, f"the content type is {content_type!r}, expected 'application/json'", code="content_type"
        )
    return parse(await read_body(request, most, seconds), kind)


def parse(body: bytes, kind: type[Parsed]) -> Parsed:
    """A body as `kind`; raises `RequestFailure` that names the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _does_not_fit(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise refused(f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise refused("the body is nested too deeply", code="invalid_json") from error


def converted(fields: Mapping[str, object], kind: type[Parsed]) -> Parsed:
    """Fields of a body as `kind`; raises `RequestFailure` that names the field that is wrong."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _does_not_fit(str(error)) from error


def _does_not_fit(reason: str) -> RequestFailure:
    place = PLACE.search(reason)
    path = place["path"].removeprefix("$").removeprefix(".") if place else ""
    found = reason if place is None else reason[: place.start()]
    if unknown := UNKNOWN_FIELD.search(found):
        param = _joined(path, unknown["name"])
        return refused(f"the field {param} is not known here; leave it out", param=param, code="unknown_field")
    if missing := MISSING_FIELD.search(found):
        param = _joined(path, missing["name"])
        return refused(f"the field {param} is missing", param=param, code="missing_field")
    shown = found if len(found) <= LONGEST_REASON else f"{found[:LONGEST_REASON]}..."
    where = f"the field {path}" if path else "the body"
    return refused(f"{where} does not fit: {shown}", param=path or None, code="invalid_value")


def _joined(path: str, name: str) -> str:
    name = name if len(name) <= LONGEST_REASON else f"{name[:LONGEST_REASON]}..."
    return f"{path}.{name}" if path else name


def json_answer(body: object, status: int = 200) -> Response:
    """An answer with a JSON body."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")
