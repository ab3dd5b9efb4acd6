"""The number of replicas that is asked for."""

from types import SimpleNamespace

import pytest

from cluster.serving.scaling import REQUESTS, SLOTS, by_slots


def context(requests, *, slots=4, queued=0):
    metrics = {REQUESTS: dict(enumerate(requests)), SLOTS: dict.fromkeys(range(len(requests)), slots)}
    return SimpleNamespace(
        aggregated_metrics=metrics if requests else {}, total_queued_requests=queued, target_num_replicas=3
    )


@pytest.mark.parametrize(
    ("requests", "queued", "replicas"),
    [([0], 0, 0), ([4], 0, 1.25), ([4, 4], 4, 3.75), ([3, 3], 0, 1.875), ([1, 0], 0, 0.3125)],
)
def test_slots_are_used_to_four_fifths(requests, queued, replicas):
    found, _ = by_slots(context(requests, queued=queued))
    assert found == pytest.approx(replicas)


def test_without_reports_nothing_changes():
    found, _ = by_slots(context([]))
    assert found == 3
