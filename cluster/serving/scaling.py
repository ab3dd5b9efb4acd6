"""How many replicas a model needs, from what its schedulers hold and what waits."""

from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

REQUESTS, SLOTS = "requests", "slots"  # what each replica reports
TARGET = 0.8  # share of the slots that is to be used


def by_slots(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """As many replicas as hold all requests, running and waiting, in 80 % of their slots.

    Ray applies the delays, factors and bounds of the deployment's `autoscaling_config` to the result.
    """
    metrics = context.aggregated_metrics or {}
    slots = _values(metrics, SLOTS)
    if not slots:
        return context.target_num_replicas, {}
    requests = sum(_values(metrics, REQUESTS)) + context.total_queued_requests
    return requests / (TARGET * max(slots)), {}


def _values(metrics: Mapping[str, Mapping[Any, float]], name: str) -> list[float]:
    return list(metrics.get(name, {}).values())
