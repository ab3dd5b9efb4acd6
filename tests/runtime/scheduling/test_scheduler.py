"""The order of calls, the ends of requests, and who waits how long."""

import itertools
import math

import numpy as np
import pytest

from runtime.decoding.options import SamplingOptions
from runtime.errors import UserError
from runtime.scheduling.requests import Ended, Failed, Generated, Request, Started
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock
from tests.helpers.random_schedules import Arrival, Run, alone, note, run_schedule

PLAIN = SchedulerSettings(speculate=False)


def seconds(kind, size, rows):
    return 0.002 * size if kind == "prefill" else 0.005 + 0.0001 * rows


def scheduler_of(settings=PLAIN, **options):
    clock = SimulatedClock()
    model = FakeSlotModel(**{"clock": clock, "seconds": seconds, **options})
    return Scheduler(model, settings, clock), model


def prompt(seed, length):
    return np.random.default_rng(seed).integers(24, size=length).tolist()


def run(scheduler, *requests):
    return run_schedule(scheduler, [Arrival(0, request) for request in requests])


def turns(scheduler, count):
    return [event for _ in range(count) for event in scheduler.turn()]


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_a_turn_makes_at_most_one_call_and_an_idle_one_none():
    scheduler, model = scheduler_of()
    assert scheduler.turn() == []
    for name in range(6):
        scheduler.submit(Request(name, prompt(name, 30), 10))
    while scheduler.has_work:
        before = len(model.calls)
        scheduler.turn()
        assert len(model.calls) <= before + 1
    assert scheduler.turn() == []


def test_requests_get_slots_in_order_of_arrival():
    scheduler, _ = scheduler_of(slots=2, step_rows=(1, 2))
    for name in range(5):
        scheduler.submit(Request(name, prompt(name, 40 - 8 * name), 3 + name))
    started = []
    while scheduler.has_work:
        started += of_kind(scheduler.turn(), Started)
        assert scheduler.statistics.running <= 2
    assert [event.request_id for event in started] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("grant", [1, 3])
@pytest.mark.parametrize("length", [50, 200])
def test_a_prompt_of_c_chunks_waits_at_most_c_times_the_grant_and_one_turn(grant, length):
    """And those that are being generated wait at most one chunk between two of their steps."""
    scheduler, model = scheduler_of(SchedulerSettings(speculate=False, steps_per_chunk=grant, stall_budget=0.01))
    for name in range(3):
        scheduler.submit(Request(name, prompt(name, 5), 200))
    turns(scheduler, 8)
    del model.calls[:]
    scheduler.submit(Request("long", prompt(9, length), 1))
    waited = 0
    while not of_kind(scheduler.turn(), Ended):
        waited += 1
    kinds = [kind for kind, _, _ in model.calls]
    chunks = kinds.count("prefill")
    assert chunks == math.ceil((length - 1) / 4), "chunks of 4 tokens stay within the budget; a last token joins a step"
    assert waited + 1 <= chunks * (grant + 1) + 1
    assert not any(one == other == "prefill" for one, other in itertools.pairwise(kinds))


def test_no_step_waits_longer_than_the_budget_for_a_chunk():
    scheduler, model = scheduler_of(SchedulerSettings(speculate=False, stall_budget=0.035), chunks=(32, 16, 4))
    scheduler.submit(Request("a", prompt(1, 100), 200))
    while not of_kind(scheduler.turn(), Generated):
        pass
    assert {size for _, size, _ in model.calls} >= {32}, "with nobody to wait, the largest chunk that is useful"
    del model.calls[:]
    scheduler.submit(Request("b", prompt(2, 97), 1))
    while not of_kind(scheduler.turn(), Ended):
        pass
    sizes = [size for kind, size, _ in model.calls if kind == "prefill"]
    assert set(sizes) == {16}, "0.032 s"


def test_prompts_take_turns():
    scheduler, model = scheduler_of(chunks=(8,))
    for name in range(3):
        scheduler.submit(Request(name, prompt(name, 33), 50))
    turns(scheduler, 9)
    assert [slots[0] for _, _, slots in model.calls] == [0, 1, 2] * 3


def test_a_short_rest_of_a_prompt_joins_a_step():
    scheduler, model = scheduler_of()
    run(scheduler, Request("first", prompt(1, 20), 5))
    del model.calls[:]
    scheduler.submit(Request("other", prompt(2, 4), 50))
    turns(scheduler, 2)
    slot = model.calls[-1][2][0]
    history = prompt(1, 20)
    scheduler.submit(Request("next", [*history, 3, 4], 5))
    (started,) = of_kind(scheduler.turn(), Started)
    assert started.cached_tokens == 20
    kind, size, slots = model.calls[-1]
    assert (kind, size, len(slots)) == ("step", 4, 3)
    assert slot in slots


def test_more_sequences_than_rows_take_turns():
    scheduler, model = scheduler_of(slots=5, step_rows=(1, 2))
    for name in range(5):
        scheduler.submit(Request(name, prompt(name, 3), 60))
    turns(scheduler, 30)
    del model.calls[:]
    turns(scheduler, 10)
    slots = [slot for _, _, rows in model.calls for slot in rows]
    assert all(slots.count(slot) == 4 for slot in range(5))


def test_a_request_ends_at_an_end_of_sequence_at_its_limit_and_when_the_slot_is_full():
    scheduler, _ = scheduler_of(cache_len=20)
    free = Request("limit", prompt(1, 8), 6)
    tokens, _ = alone(FakeSlotModel(), free)
    result = run(
        scheduler,
        free,
        Request("stop", prompt(1, 8), 6, eos_ids=(tokens[3],)),
        Request("full", prompt(1, 8), 100),
        Request("whole", prompt(1, 20), 100),
    )
    assert result.ends == {("limit", 0): "length", ("stop", 0): "stop", ("full", 0): "length", ("whole", 0): "length"}
    assert result.tokens["limit", 0] == tokens
    assert result.tokens["stop", 0] == tokens[: tokens.index(tokens[3]) + 1]
    assert len(result.tokens["full", 0]) == 13, "12 that fit after the prompt, and one that need not be fed"
    assert len(result.tokens["whole", 0]) == 1


def test_the_last_step_has_the_reason_and_logprobs_are_those_of_the_logits():
    scheduler, _ = scheduler_of()
    scheduler.submit(Request("a", prompt(1, 8), 3, logprobs=2))
    steps = [event.step for event in of_kind(turns(scheduler, 5), Generated)]
    assert [step.finish_reason for step in steps] == [None, None, "length"]
    logits = FakeSlotModel().prefill(0, prompt(1, 8)).astype(np.float64)
    best = np.argsort(-logits)[:2]
    expected = logits[best] - np.log(np.exp(logits).sum())
    assert [token for token, _ in steps[0].logprobs] == best.tolist()
    np.testing.assert_allclose([value for _, value in steps[0].logprobs], expected, rtol=1e-6)


def test_a_cancelled_request_frees_its_slot_at_the_next_turn():
    scheduler, model = scheduler_of(slots=1, step_rows=(1,))
    scheduler.submit(Request("a", prompt(1, 8), 100))
    scheduler.submit(Request("waits", prompt(3, 8), 100))
    scheduler.submit(Request("b", prompt(2, 4), 1))
    turns(scheduler, 3)
    scheduler.cancel("a")
    scheduler.cancel("a")
    scheduler.cancel("waits")
    scheduler.cancel("nobody")
    events = scheduler.turn()
    ended = [(event.request_id, event.reason) for event in of_kind(events, Ended)]
    assert ended == [("a", "cancelled"), ("waits", "cancelled"), ("b", "length")]
    assert [event.request_id for event in of_kind(events, Started)] == ["b"]
    assert model.calls[-1][0] == "prefill"


def test_one_choice_can_be_cancelled():
    scheduler, _ = scheduler_of()
    result = Run()
    scheduler.submit(Request("a", prompt(1, 8), 12, SamplingOptions(temperature=1.0, seed=1), choices=2))
    for turn in range(100):
        if turn == 5:
            scheduler.cancel("a", 1)
        for event in scheduler.turn():
            note(result, event)
    assert result.ends == {("a", 0): "length", ("a", 1): "cancelled"}


def test_logits_of_nan_end_their_own_request_only():
    requests = [Request(name, prompt(name, 20), 60) for name in range(4)]
    poison = next(
        token
        for token in range(24)
        if any(token in alone(FakeSlotModel(), one)[0] for one in requests)
        and not all(token in alone(FakeSlotModel(), one)[0] + one.prompt_ids for one in requests)
    )
    scheduler, model = scheduler_of(poison=poison)
    scheduler_result = run(scheduler, *requests)
    expected = {(one.request_id, 0): alone(FakeSlotModel(poison=poison), one) for one in requests}
    assert {key: (scheduler_result.tokens[key], scheduler_result.ends[key]) for key in expected} == expected
    assert set(scheduler_result.ends.values()) == {"failed", "length"}
    assert any(not model.tokens(slot) for slot in range(4)), "what failed is not kept"


def test_a_token_outside_the_vocabulary_ends_its_own_request_only():
    scheduler, _ = scheduler_of()
    scheduler.submit(Request("good", prompt(1, 20), 5))
    scheduler.submit(Request("bad", [1, 2, 99, *prompt(2, 10)], 5))
    scheduler.submit(Request("bias", prompt(3, 20), 5, SamplingOptions(logit_bias={99: 1.0})))
    events = turns(scheduler, 30)
    assert {event.request_id for event in of_kind(events, Failed)} == {"bad", "bias"}
    assert "outside the vocabulary" in of_kind(events, Failed)[0].error
    assert [event.request_id for event in of_kind(events, Ended)] == ["good"]


def test_choices_share_one_computation_of_their_prompt():
    scheduler, model = scheduler_of(slots=4)
    request = Request("a", prompt(1, 64), 8, SamplingOptions(temperature=1.0, seed=5), choices=6)
    result = run(scheduler, request)
    for choice in range(6):
        assert result.tokens["a", choice] == alone(FakeSlotModel(), request, choice)[0]
    assert len({tuple(tokens) for tokens in result.tokens.values()}) > 1
    assert [kind for kind, _, _ in model.calls].count("prefill") == 4
    assert scheduler.statistics.prompt_tokens == 64 + 5, "the last token gives each choice its logits"
    assert [event.cached_tokens for event in result.started.values()] == [0, 63, 63, 63, 63, 63]


def test_if_the_first_choice_ends_early_only_the_next_one_goes_on_with_the_prompt():
    scheduler, _ = scheduler_of()
    request = Request("a", prompt(1, 64), 8, SamplingOptions(temperature=1.0, seed=5), choices=3)
    scheduler.submit(request)
    turns(scheduler, 2)
    scheduler.cancel("a", 0)
    result = Run()
    for event in turns(scheduler, 40):
        note(result, event)
    assert [result.tokens["a", choice] for choice in (1, 2)] == [alone(FakeSlotModel(), request, c)[0] for c in (1, 2)]
    assert scheduler.statistics.prompt_tokens == 64 + 1, "what the first choice had computed was copied"


def test_a_prompt_that_does_not_fit_is_refused_at_once():
    scheduler, _ = scheduler_of(cache_len=20)
    with pytest.raises(UserError, match="has 21 tokens, expected at most 20"):
        scheduler.submit(Request("a", prompt(1, 21), 5))
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [3, -1]}, "token id -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"choices": 0}, "choices is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_wrong_requests_are_refused(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        Request(**{"request_id": 1, "prompt_ids": [1], "max_tokens": 1, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"stall_budget": -1.0},
        {"stall_budget": math.nan},
        {"steps_per_chunk": 0},
        {"reuse": "some"},
        {"snapshot_bytes": -1},
        {"most_drafts": 0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"setting {name} is"):
        SchedulerSettings(**wrong)


def test_statistics_count_what_happened():
    scheduler, model = scheduler_of()
    run(scheduler, Request("a", prompt(1, 40), 10), Request("b", [*prompt(1, 40), 5, 6], 10))
    found = scheduler.statistics
    assert found.chunks == [kind for kind, _, _ in model.calls].count("prefill")
    assert found.steps == [kind for kind, _, _ in model.calls].count("step")
    assert found.rows == sum(len(rows) for kind, _, rows in model.calls if kind == "step")
    assert found.generated_tokens == 20
    assert found.prefix_queries == 82
    assert found.prompt_tokens + found.prefix_hits == 82
    assert (found.waiting, found.running) == (0, 0)
