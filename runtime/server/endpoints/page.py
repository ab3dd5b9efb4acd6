"""`GET /`: the page, one file that asks nobody but this server."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from runtime.server.service import Service

PAGE = Path(__file__).parents[1] / "page.html"
INLINE = re.compile(r"<(?P<kind>script|style)>(?P<text>.*?)</(?P=kind)>", re.DOTALL)


async def answer(_service: Service, _request: Request) -> Response:
    """The page, which the browser lets run nothing but its own script."""
    page, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(page, headers=headers, media_type="text/html")


@cache
def _page() -> tuple[bytes, str]:
    """The page, and a Content-Security-Policy that names its scripts and styles by their sums.

    https://www.w3.org/TR/CSP3/#framework-directive-source-list
    """
    text = PAGE.read_text(encoding="utf-8")
    sums: dict[str, list[str]] = {"script": [], "style": []}
    for found in INLINE.finditer(text):
        digest = base64.b64encode(hashlib.sha256(found["text"].encode()).digest()).decode()
        sums[found["kind"]].append(f"'sha256-{digest}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(sums['script'])}; style-src {' '.join(sums['style'])}; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy
