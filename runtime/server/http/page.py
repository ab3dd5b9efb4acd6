"""The page at `/`: its bytes, and headers with which a browser runs nothing but what stands in it."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE_FILE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Page:
    """What `GET /` answers."""

    body: bytes
    headers: Mapping[str, str]


def load_page(path: Path = PAGE_FILE) -> Page:
    """Read the page, and allow its own scripts and styles by their hashes."""
    text = path.read_text(encoding="utf-8")
    return Page(
        body=text.encode(),
        headers={
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": content_security_policy(text),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # after an update of the server, the old page would meet the new API
        },
    )


def content_security_policy(page: str) -> str:
    """The strictest policy under which the page works (Content Security Policy Level 3, and Trusted Types).

    Its inline scripts and styles are named by SHA-256; it asks nothing but its own server; no site frames it; and a
    string never becomes HTML, even if a script tried.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(_hashes(page, 'script'))}",
            f"style-src {' '.join(_hashes(page, 'style'))}",
            "connect-src 'self'",
            "img-src data:",  # the icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hashes(page: str, tag: str) -> Iterator[str]:
    """Yield the source expression of each inline element of a tag, in the order of the page."""
    for content in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
        digest = hashlib.sha256(content.encode()).digest()
        yield f"'sha256-{base64.b64encode(digest).decode()}'"
