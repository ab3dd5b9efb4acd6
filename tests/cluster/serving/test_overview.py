"""Several replicas shown as one server."""

from cluster.serving.overview import merged_slots
from runtime.server.api.status import Percentiles, PrefixCacheCounts, RequestCounts, SlotsResponse, SlotState


def replica(model, *, uptime, ttft, slots):
    states = [SlotState(number, "decoding", 5, f"r{number}") for number in range(slots)]
    counts = PrefixCacheCounts(10, 4), RequestCounts(1, 7)
    return SlotsResponse(model, "ready", uptime, states, 2, 30, 12.5, 1.5, Percentiles(*ttft), *counts)


def test_slots_are_numbered_anew_and_counts_are_added():
    found = merged_slots(
        [replica("a", uptime=5.0, ttft=(0.1, 0.3), slots=2), replica("a", uptime=9.0, ttft=(0.2, None), slots=1)]
    )
    assert [slot.id for slot in found.slots] == [0, 1, 2]
    assert (found.model, found.uptime_seconds, found.waiting, found.queued_tokens) == ("a", 9.0, 4, 60)
    assert (found.generated_tokens_per_second, found.prompt_tokens_per_second) == (25.0, 3.0)
    assert found.ttft_seconds == Percentiles(0.2, 0.3)
    assert found.prefix_cache == PrefixCacheCounts(20, 8)
    assert found.requests == RequestCounts(2, 14)


def test_no_replica_is_a_server_that_loads():
    found = merged_slots([])
    assert (found.status, found.slots, found.ttft_seconds) == ("loading", [], Percentiles(None, None))
