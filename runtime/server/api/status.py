"""`/health`, `/ready` and `/slots`."""

from typing import Literal

import msgspec

State = Literal["loading", "ready", "draining", "failed"]


class Health(msgspec.Struct, frozen=True):
    """Whether the server works, and whether it takes requests."""

    status: State
    detail: str = ""


class SlotState(msgspec.Struct, frozen=True):
    """What one slot does, and how many tokens it holds."""

    id: int
    state: Literal["idle", "prompt", "decoding"]
    tokens: int
    request_id: str | None


class Percentiles(msgspec.Struct, frozen=True):
    """Of the last requests; null before there are any."""

    p50: float | None
    p99: float | None


class PrefixCacheCounts(msgspec.Struct, frozen=True):
    """Prompt tokens that were looked for in slots and snapshots, and those that were found."""

    queries: int
    hits: int


class RequestCounts(msgspec.Struct, frozen=True):
    """Requests that run, and those that are over."""

    running: int
    finished: int


class SlotsResponse(msgspec.Struct, frozen=True):
    """What the server does now; rates are those of the last seconds."""

    model: str
    status: State
    uptime_seconds: float
    slots: list[SlotState]
    waiting: int
    queued_tokens: int
    generated_tokens_per_second: float
    prompt_tokens_per_second: float
    ttft_seconds: Percentiles
    prefix_cache: PrefixCacheCounts
    requests: RequestCounts
