"""Log probabilities of a prompt's own tokens."""

import itertools

import numpy as np
import pytest

from runtime.decoding.options import SamplingOptions
from runtime.errors import UserError
from runtime.scheduling.requests import Ended, Failed, Generated, Request, Scored, Started
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock

LIKELIEST = 3


def scheduler_of(settings=None, **options):
    clock = SimulatedClock()
    model = FakeSlotModel(**{"clock": clock, **options})
    return Scheduler(model, settings or SchedulerSettings(), clock), model


def prompt(seed, length):
    return np.random.default_rng(seed).integers(24, size=length).tolist()


def run(scheduler, *requests):
    """The events of all requests, by request."""
    for request in requests:
        scheduler.submit(request)
    events = []
    while scheduler.has_work:
        events += scheduler.turn()
    return {each.request_id: [e for e in events if e.request_id == each.request_id] for each in requests}


def scores_of(events):
    return [token for event in events if isinstance(event, Scored) for token in event.tokens]


def expected_scores(ids):
    """From one prefill call for each token of a slot of its own."""
    model, expected = FakeSlotModel(slots=1), []
    for token, following in itertools.pairwise(ids):
        logits = model.prefill(0, [token]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logits, kind="stable")[:LIKELIEST]
        expected.append((logprobs[following], [(int(one), logprobs[one]) for one in best]))
    return expected


def check(found, ids):
    expected = expected_scores(ids)
    assert len(found) == len(expected)
    for one, (chosen, top) in zip(found, expected, strict=True):
        assert one.chosen == pytest.approx(chosen, rel=1e-9)
        assert [token for token, _ in one.top] == [token for token, _ in top]
        assert [logprob for _, logprob in one.top] == pytest.approx([logprob for _, logprob in top], rel=1e-9)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 9, 23])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_every_token_but_the_first_has_one(length, max_tokens):
    ids = prompt(1, length)
    scheduler, model = scheduler_of()
    events = run(scheduler, Request("a", ids, max_tokens, prompt_logprobs=LIKELIEST))["a"]
    check(scores_of(events), ids)
    steps = [event.step for event in events if isinstance(event, Generated)]
    assert len(steps) == max_tokens
    assert [type(event) for event in events if not isinstance(event, Scored)] == [
        Started,
        *[Generated] * max_tokens,
        Ended,
    ]
    assert events[-1].reason == "length"
    assert {kind for kind, _, _ in model.calls} == {"step"}, "only a step has the logits of each row"
    assert scheduler.statistics.prompt_tokens == length


def test_what_follows_is_as_without_scores():
    ids = prompt(1, 23)
    options = SamplingOptions(temperature=1.0, seed=5)
    plain = run(scheduler_of()[0], Request("a", ids, 8, options, logprobs=1))["a"]
    scored = run(scheduler_of()[0], Request("a", ids, 8, options, logprobs=1, prompt_logprobs=0))["a"]
    assert [e.step for e in scored if isinstance(e, Generated)] == [e.step for e in plain if isinstance(e, Generated)]


@pytest.mark.parametrize("reuse", ["full", "exact"])
def test_no_prefix_is_reused_but_what_was_scored_can_be(reuse):
    ids = prompt(1, 40)
    scheduler, _ = scheduler_of(SchedulerSettings(reuse=reuse, snapshot_bytes=2**20))
    run(scheduler, Request("before", ids, 3))
    events = run(scheduler, Request("scored", ids, 3, prompt_logprobs=LIKELIEST))["scored"]
    check(scores_of(events), ids)
    assert events[0] == Started("scored", 0)
    after = run(scheduler, Request("after", [*ids, 5], 3))["after"]
    assert after[0].cached_tokens >= (32 if reuse == "exact" else 40)
    fresh = run(scheduler_of()[0], Request("after", [*ids, 5], 3))["after"]
    assert after[1:] == fresh[1:]


def test_further_choices_take_the_prompt_of_the_first():
    ids = prompt(1, 30)
    options = SamplingOptions(temperature=1.0, seed=5)
    scheduler, _ = scheduler_of()
    scored = run(scheduler, Request("a", ids, 4, options, choices=3, prompt_logprobs=LIKELIEST))["a"]
    check(scores_of(scored), ids)
    assert {event.choice for event in scored if isinstance(event, Scored)} == {0}
    plain = run(scheduler_of()[0], Request("a", ids, 4, options, choices=3))["a"]
    for choice in range(3):
        mine, theirs = (
            [e.step for e in events if isinstance(e, Generated) and e.choice == choice] for events in (scored, plain)
        )
        assert mine == theirs


def test_those_who_are_generating_keep_their_grant_of_steps():
    scheduler, model = scheduler_of(SchedulerSettings(speculate=False, steps_per_chunk=3))
    scheduler.submit(Request("other", prompt(2, 4), 100))
    for _ in range(4):
        scheduler.turn()
    (other,) = {slots[0] for kind, _, slots in model.calls if kind == "step"}
    del model.calls[:]
    ids = prompt(1, 20)
    scheduler.submit(Request("scored", ids, 0, prompt_logprobs=LIKELIEST))
    events = []
    while not any(isinstance(event, Ended) for event in events):
        events += scheduler.turn()
    check(scores_of(events), ids)
    others = [slots[0] == other for _, _, slots in model.calls]
    assert others == [False, True, True, True] * (len(ids) // model.step_rows[-1] - 1) + [False]


def test_it_can_be_cancelled_midway_and_the_slot_is_used_again():
    scheduler, _ = scheduler_of(slots=1)
    scheduler.submit(Request("scored", prompt(1, 40), 0, prompt_logprobs=1))
    assert any(isinstance(event, Scored) for event in [*scheduler.turn(), *scheduler.turn()])
    scheduler.cancel("scored")
    assert scheduler.turn() == [Ended("scored", "cancelled")]
    ids = prompt(1, 40)
    check(scores_of(run(scheduler, Request("again", ids, 0, prompt_logprobs=LIKELIEST))["again"]), ids)


def test_numbers_that_are_not_finite_end_it():
    ids = [1, 2, 3, 7, 4, 5]
    scheduler, _ = scheduler_of(poison=7)
    events = run(scheduler, Request("a", ids, 0, prompt_logprobs=1))["a"]
    assert isinstance(events[-1], Failed)
    assert "nan or infinity" in events[-1].error
    again = run(scheduler, Request("b", [1, 2, 3], 1, prompt_logprobs=LIKELIEST))["b"]
    check(scores_of(again), [1, 2, 3])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": 0, "prompt_logprobs": 1, "choices": 2}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": -1, "prompt_logprobs": 1}, "max_tokens is -1, expected at least 0"),
        ({"max_tokens": 1, "prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ],
)
def test_values_out_of_range_are_refused(fields, expected):
    with pytest.raises(UserError, match=expected):
        Request("a", [1], **fields)
