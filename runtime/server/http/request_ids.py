"""The id of a request, which its answer, its log line and every error name."""

import re
import secrets
from contextvars import ContextVar

HEADER = "x-request-id"
USABLE = re.compile(r"[A-Za-z0-9._:-]{1,128}")
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")


def request_id_of(given: str | None) -> str:
    """The id that a client gave, if it is safe to write into a header and a log; otherwise a new one."""
    if given is not None and USABLE.fullmatch(given):
        return given
    return f"req-{secrets.token_hex(12)}"
