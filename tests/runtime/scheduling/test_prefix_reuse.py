"""Which slot a prompt gets, what it continues from, and what is kept of the others."""

import numpy as np
import pytest

from runtime.decoding.options import SamplingOptions
from runtime.scheduling.prefix_cache import common_prefix
from runtime.scheduling.requests import Ended, Request, Started
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from runtime.scheduling.snapshots import SnapshotStore
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock
from tests.helpers.random_schedules import Arrival, alone, run_schedule


def ids(seed, length):
    return np.random.default_rng(seed).integers(24, size=length).tolist()


def scheduler_of(settings=None, **options):
    model = FakeSlotModel(**options)
    return Scheduler(model, settings or SchedulerSettings(speculate=False), SimulatedClock()), model


def started(scheduler, name, prompt, max_tokens=1):
    """Runs a request to its end; returns its first event and its tokens, which are those that it gives alone."""
    request = Request(name, prompt, max_tokens)
    result = run_schedule(scheduler, [Arrival(0, request)])
    model = scheduler._model
    fresh = FakeSlotModel(windows=model.windows, cache_len=model.cache_len, chunks=model.chunks)
    assert result.tokens[name, 0] == alone(fresh, request)[0]
    return result.started[name, 0], result.tokens[name, 0]


def slot_of(model, prompt):
    (slot,) = [slot for slot in range(model.slots) if model.tokens(slot)[: len(prompt)] == prompt]
    return slot


def test_the_next_turn_of_a_conversation_continues_in_its_slot():
    scheduler, model = scheduler_of()
    _, reply = started(scheduler, "first", ids(1, 30), 10)
    slot = slot_of(model, ids(1, 30))
    event, _ = started(scheduler, "second", [*ids(1, 30), *reply, 7, 8], 5)
    assert event.cached_tokens == 39, "all but the last token of the reply, which was never fed"
    assert slot_of(model, ids(1, 30)) == slot
    assert not model.copies


def test_the_last_token_of_a_prompt_is_always_computed():
    scheduler, _ = scheduler_of()
    started(scheduler, "first", ids(1, 30))
    event, _ = started(scheduler, "again", ids(1, 30))
    assert event.cached_tokens == 29


def test_without_a_common_prefix_the_empty_slots_come_first_and_then_the_one_unused_for_longest():
    scheduler, model = scheduler_of(slots=3)
    for name in range(5):
        started(scheduler, name, [name, *ids(name, 30)])
    assert [model.tokens(slot)[0] for slot in range(3)] == [3, 4, 2]


def test_a_prefix_is_copied_where_the_rest_of_its_slot_is_worth_keeping():
    scheduler, model = scheduler_of()
    started(scheduler, "first", ids(1, 60))
    event, _ = started(scheduler, "fork", [*ids(1, 40), *ids(2, 5)])
    assert event.cached_tokens == 40
    assert model.copies == [(0, 1, 40)]
    assert list(model.tokens(0)) == ids(1, 60)


def test_a_few_common_tokens_choose_no_slot():
    scheduler, model = scheduler_of()
    started(scheduler, "first", [1, 2, *ids(1, 60)])
    event, _ = started(scheduler, "other", [1, 2, *ids(2, 30)])
    assert event.cached_tokens == 0
    assert len(model.tokens(0)) == 62
    assert not model.copies


def test_a_prefix_in_a_busy_slot_is_copied():
    scheduler, model = scheduler_of()
    scheduler.submit(Request("busy", ids(1, 40), 30))
    while not model.calls or model.calls[-1][0] == "prefill":
        scheduler.turn()
    fork = Request("fork", [*ids(1, 40), 5, 6], 4)
    scheduler.submit(fork)
    events = scheduler.turn()
    (event,) = [event for event in events if isinstance(event, Started)]
    assert event.cached_tokens == 40
    assert model.copies[0][2] == 40


def test_a_free_slot_that_holds_nearly_as_much_as_a_busy_one_is_taken_without_a_copy():
    scheduler, model = scheduler_of()
    scheduler.submit(Request("busy", [*ids(1, 39), *ids(2, 30)], 60))
    for _ in range(8):
        scheduler.turn()
    scheduler.submit(Request("free", ids(1, 39), 1))
    for _ in range(2):
        scheduler.turn()
    model.copies.clear()
    scheduler.submit(Request("next", [*ids(1, 39), *ids(2, 8), 9], 1))
    (event,) = [event for event in scheduler.turn() if isinstance(event, Started)]
    assert event.cached_tokens == 39, "in the busy slot there are 47"
    assert not model.copies


def test_a_wrapped_ring_reuses_only_what_it_can_undo_and_says_so():
    scheduler, _ = scheduler_of(windows=(10,), chunks=(8,), step_rows=(1, 2, 4))
    prompt = ids(1, 40)
    started(scheduler, "first", prompt)
    event, _ = started(scheduler, "near", [*prompt[:34], 3, 4])
    assert event.cached_tokens == 34, "within the last 8"
    assert event.not_reused is None
    event, _ = started(scheduler, "far", [*prompt[:25], 3, 4])
    assert event.cached_tokens == 0
    assert event.not_reused == (
        "25 tokens of the prompt lie in a slot whose rolling cache has moved on: "
        "it no longer holds what the next token would see"
    )


def test_what_a_ring_has_overwritten_stays_lost_after_a_rewind():
    scheduler, _ = scheduler_of(windows=(10,), chunks=(8,))
    prompt = ids(1, 40)
    started(scheduler, "first", prompt)
    started(scheduler, "near", [*prompt[:34], 3])
    event, _ = started(scheduler, "nearer", [*prompt[:30], 4])
    assert event.cached_tokens == 0
    assert "30 tokens" in event.not_reused


def test_exact_reuses_whole_chunks_of_prompts_alone():
    scheduler, _ = scheduler_of(SchedulerSettings(reuse="exact"), chunks=(16, 4))
    _, reply = started(scheduler, "first", ids(1, 37), 30)
    event, _ = started(scheduler, "second", [*ids(1, 37), *reply, 5], 1)
    assert event.cached_tokens == 32, "the chunks at 0 and 16; neither the rest of the prompt nor the reply"
    event, _ = started(scheduler, "third", [*ids(1, 31), 5], 1)
    assert event.cached_tokens == 16


@pytest.mark.parametrize("snapshot_bytes", [0, 10_000])
def test_exact_knows_what_was_generated_after_other_prompts_and_after_snapshots(snapshot_bytes):
    settings = SchedulerSettings(reuse="exact", snapshot_bytes=snapshot_bytes)
    scheduler, _ = scheduler_of(settings, slots=1, step_rows=(1,), chunks=(16, 4))
    started(scheduler, "long", ids(1, 64))
    _, reply = started(scheduler, "short", ids(2, 9), 50)
    if snapshot_bytes:
        started(scheduler, "other", ids(3, 20))
    event, _ = started(scheduler, "next", [*ids(2, 9), *reply, 5])
    assert event.cached_tokens == 0


def test_off_reuses_nothing():
    scheduler, _ = scheduler_of(SchedulerSettings(reuse="off", snapshot_bytes=10_000))
    started(scheduler, "first", ids(1, 37))
    event, _ = started(scheduler, "second", ids(1, 37))
    assert event.cached_tokens == 0
    assert event.not_reused is None
    assert not scheduler.prefixes.snapshots.saved


def test_where_results_depend_on_the_call_a_prompt_gives_the_same_bits_after_any_reuse():
    """Also while others run; the logits show in the log probabilities."""

    def last_logits(scheduler, others):
        for name, other in enumerate(others):
            scheduler.submit(Request(name, other, 40))
            for _ in range(7):
                scheduler.turn()
        scheduler.submit(Request("asked", ids(1, 45), 1, SamplingOptions(temperature=1.0, seed=3), logprobs=5))
        found = []
        while not any(event.request_id == "asked" and isinstance(event, Ended) for event in found):
            found += scheduler.turn()
        first = next(event for event in found if event.request_id == "asked" and isinstance(event, Started))
        return next(event.step for event in found if event.request_id == "asked" and hasattr(event, "step")), first

    settings = SchedulerSettings()
    expected, _ = last_logits(scheduler_of(settings, same_bits=False)[0], [])
    cached = set()
    for others in ([ids(2, 20)], [ids(1, 45)], [ids(1, 33), ids(1, 20)], [[*ids(1, 45), *ids(4, 30)], ids(5, 9)]):
        scheduler, _ = scheduler_of(settings, same_bits=False)
        step, first = last_logits(scheduler, others)
        assert step == expected
        cached.add(first.cached_tokens)
    assert cached == {0, 32}


def test_a_snapshot_lets_a_prefix_survive_its_slot():
    settings = SchedulerSettings(speculate=False, snapshot_bytes=10_000)
    scheduler, _ = scheduler_of(settings, slots=1, step_rows=(1,))
    started(scheduler, "first", [*ids(1, 40), 3])
    started(scheduler, "other", ids(2, 40))
    event, _ = started(scheduler, "again", [*ids(1, 40), 4])
    assert event.cached_tokens == 40


def test_a_snapshot_at_the_end_of_whole_chunks_lets_a_prefix_survive_the_wrap():
    settings = SchedulerSettings(speculate=False, snapshot_bytes=10_000)
    scheduler, _ = scheduler_of(settings, slots=1, step_rows=(1,), windows=(10,), chunks=(16, 4))
    started(scheduler, "first", [*ids(1, 40), 3], 40)
    event, _ = started(scheduler, "again", [*ids(1, 40), 4], 40)
    assert event.cached_tokens == 32


def filled_slots(count):
    model = FakeSlotModel(slots=count)
    for slot in range(count):
        model.prefill(slot, ids(slot, 10))
    return model


def kept(store):
    return [list(one.snapshot.tokens) for one in store.saved]


def test_snapshots_stay_within_their_bytes_and_the_least_recently_used_go_first():
    model = filled_slots(4)
    store = SnapshotStore(budget=35)  # each has 10
    for slot in range(3):
        assert store.save(model, slot, 0)
    store.touch(store.saved[0])
    assert store.save(model, 3, 0)
    assert kept(store) == [ids(2, 10), ids(0, 10), ids(3, 10)]
    assert store.nbytes == 30


def test_what_a_snapshot_serves_is_not_saved_again():
    model = filled_slots(1)
    store = SnapshotStore(budget=100)
    assert store.save(model, 0, 0)
    assert not store.save(model, 0, 0)
    model.prefill(0, [1, 2])
    assert store.save(model, 0, 0)
    assert kept(store) == [[*ids(0, 10), 1, 2]], "the longer one can be rewound to the shorter one"
    model.rewind(0, 10)
    assert not store.save(model, 0, 0)


def test_a_snapshot_larger_than_the_budget_is_tried_once():
    settings = SchedulerSettings(speculate=False, snapshot_bytes=20)
    scheduler, model = scheduler_of(settings)
    saves = []
    save = model.save
    model.save = lambda slot: saves.append(slot) or save(slot)
    for name in range(4):
        started(scheduler, name, ids(name, 40))
    assert len(saves) == 1
    assert not scheduler.prefixes.snapshots.saved


@pytest.mark.parametrize("seed", range(10))
def test_common_prefix_is_that_of_a_loop(seed):
    random = np.random.default_rng(seed)
    one = random.integers(3, size=random.integers(40)).tolist()
    other = [*one[: random.integers(len(one) + 1)], *random.integers(3, size=5).tolist()]
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common_prefix(one, other) == common_prefix(tuple(other), one) == expected
