"""`GET /`: the page, one file that asks nobody but this server."""

from functools import cache

from starlette.requests import Request
from starlette.responses import Response

from runtime.server.http.page import Page, load_page
from runtime.server.service import Service


async def answer(_service: Service, _request: Request) -> Response:
    """The page."""
    return page_answer()


def page_answer() -> Response:
    """The page, which the browser lets run nothing but its own scripts."""
    page = _page()
    return Response(page.body, headers=dict(page.headers))


@cache
def _page() -> Page:
    return load_page()
