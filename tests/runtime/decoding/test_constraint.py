"""Constraints in sampling: what is not allowed is never drawn, and one that fails harms nobody else."""

import numpy as np
import pytest

from runtime.decoding.constraint import EitherGrammar, FreeText
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import NO_ID, SampledRow, Sampler, sample_rows
from runtime.errors import UserError
from runtime.scheduling.requests import Failed, Request
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock
from tests.helpers.random_schedules import Arrival, alone, run_schedule

VOCAB = 24
EOS = 23


class Counting:
    """A grammar of the ids 0, 1, 2, ... in order, up to `last`, with any of the ids 10 to 15 between two of them.

    It fails behind the id `fails`.
    """

    def __init__(self, last=5, fails=None):
        self.last, self.fails = last, fails

    def begin(self):
        return CountingText(self)


class CountingText:
    def __init__(self, grammar):
        self._grammar = grammar
        self._ids = []

    def allowed(self, drafts=()):
        numbers = [token_id for token_id in [*self._ids, *drafts] if token_id < 10]
        if numbers and numbers[-1] == self._grammar.fails:
            raise UserError("the grammar cannot go on")
        mask = np.zeros(VOCAB, bool)
        if len(numbers) > self._grammar.last:
            mask[EOS] = True
        else:
            mask[len(numbers)] = True
            mask[10:16] = True
        return mask

    def permitted(self, drafts):
        for place, token_id in enumerate(drafts):
            if token_id == EOS or not self.allowed(drafts[:place])[token_id]:
                return place
        return len(drafts)

    def append(self, token_id):
        self._ids.append(token_id)


OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=1.0, seed=1),
    SamplingOptions(temperature=1.0, seed=1, top_k=20),
    SamplingOptions(temperature=2.0, seed=1, top_p=0.99),
    SamplingOptions(temperature=1.0, seed=1, min_p=0.01),
    SamplingOptions(temperature=1.0, seed=1, top_p=1.0, min_p=0.0),
    SamplingOptions(temperature=1e-30, seed=1),
    SamplingOptions(temperature=1.0, seed=1, repetition_penalty=1.3, presence_penalty=1.0, frequency_penalty=1.0),
    SamplingOptions(temperature=1.0, seed=1, logit_bias={20: 100.0, 3: -100.0}),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_only_allowed_ids_are_drawn_and_as_without_the_others(options):
    """The draw is that from logits in which the others are minus infinity to begin with."""
    random = np.random.default_rng(0)
    sampler = Sampler(options, (1, 2), Counting().begin())
    plain = Sampler(options, (1, 2))
    for _ in range(200):
        logits = random.standard_normal(VOCAB).astype(np.float32) * 3
        allowed = sampler.constraint.allowed()
        token_id = sampler.sample(logits)
        assert allowed[token_id]
        assert token_id == plain.sample(np.where(allowed, logits, -np.inf).astype(np.float32))
        sampler.append(token_id)
        plain.append(token_id)
        if token_id == EOS:
            return


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_logits_that_are_not_finite_are_found_though_they_are_not_allowed(options, wrong):
    logits = np.zeros(VOCAB, np.float32)
    logits[9] = wrong
    assert sample_rows(logits[None], [SampledRow(Sampler(options, (), Counting().begin()))]).tolist() == [NO_ID]


def test_rows_of_drafts_are_those_of_drawing_one_by_one():
    random = np.random.default_rng(1)
    logits = random.standard_normal((4, VOCAB)).astype(np.float32)
    options = SamplingOptions(temperature=1.0, seed=3)
    one_by_one = Sampler(options, (), Counting().begin())
    ids = []
    for row in logits:
        ids.append(one_by_one.sample(row))
        one_by_one.append(ids[-1])
    sampler = Sampler(options, (), Counting().begin())
    rows = [SampledRow(sampler, ids[:count]) for count in range(4)]
    assert sample_rows(logits, rows).tolist() == ids


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_each_choice_keeps_to_the_grammar_and_speculation_changes_nothing(options, speculate):
    clock = SimulatedClock()
    model = FakeSlotModel(repeats=4.0, step_rows=(1, 2, 4, 8), clock=clock, seconds=lambda kind, size, rows: 1.0)
    scheduler = Scheduler(model, SchedulerSettings(speculate=speculate), clock)
    request = Request("a", (1, 2, 3), 80, options, (EOS,), choices=3, grammar=Counting(9))
    result = run_schedule(scheduler, [Arrival(0, request)])
    for choice in range(3):
        tokens = result.tokens["a", choice]
        assert (tokens, result.ends["a", choice]) == alone(FakeSlotModel(repeats=4.0), request, choice)
        numbers = [token_id for token_id in tokens if token_id < 10]
        assert numbers == list(range(len(numbers)))
        assert set(tokens) <= {*range(16), EOS}


@pytest.mark.parametrize("speculate", [False, True])
def test_a_constraint_that_fails_ends_only_its_own_choice(speculate):
    clock = SimulatedClock()
    model = FakeSlotModel(step_rows=(1, 2, 4, 8), clock=clock, seconds=lambda kind, size, rows: 1.0)
    scheduler = Scheduler(model, SchedulerSettings(speculate=speculate), clock)
    options = SamplingOptions(temperature=1.0, seed=5)
    requests = {
        name: Request(name, (1, 2, 3), 60, options, (EOS,), grammar=grammar)
        for name, grammar in {"a": Counting(), "b": Counting(fails=2), "c": None}.items()
    }
    for request in requests.values():
        scheduler.submit(request)
    tokens, failed = {name: [] for name in requests}, []
    while scheduler.has_work:
        for event in scheduler.turn():
            if isinstance(event, Failed):
                failed.append((event.request_id, event.error))
            elif hasattr(event, "step"):
                tokens[event.request_id].append(event.step.token_id)
    assert failed == [("b", "the grammar cannot go on")]
    assert [token_id for token_id in tokens["b"] if token_id < 10] == [0, 1, 2]
    for name in "ac":
        assert tokens[name] == alone(FakeSlotModel(), requests[name])[0]


def test_free_text_has_no_forbidden_ids_and_ends_with_its_last_one():
    grammar = FreeText(VOCAB, forbidden=(7, EOS), until=8, then=Counting())
    constraint = grammar.begin()
    assert np.flatnonzero(~constraint.allowed()).tolist() == [7, EOS]
    assert (constraint.allowed([4, 4]) == constraint.allowed()).all()
    assert np.flatnonzero(constraint.allowed([4, 8])).tolist() == [0, *range(10, 16)]
    assert np.flatnonzero(constraint.allowed([4, 8, 0])).tolist() == [1, *range(10, 16)]
    assert constraint.permitted([4, 7, 8]) == 1
    assert constraint.permitted([4, 8, 0, 0]) == 3
    assert constraint.permitted([4, 4]) == 2
    for token_id in (4, 8, 0):
        constraint.append(token_id)
    assert constraint.permitted([1, 8]) == 1
    assert np.flatnonzero(constraint.allowed()).tolist() == [1, *range(10, 16)]


def test_free_text_without_an_end_is_any_text():
    constraint = FreeText(VOCAB).begin()
    constraint.append(EOS)
    assert constraint.allowed([1]) is None
    assert constraint.permitted([1, 2]) == 2


def test_the_first_id_decides_between_two_grammars():
    grammar = EitherGrammar(9, FreeText(VOCAB, forbidden=(3,)), Counting())
    constraint = grammar.begin()
    assert np.flatnonzero(constraint.allowed()).tolist() == [0, 9, *range(10, 16)]
    assert constraint.permitted([9, 2, 3]) == 2
    assert constraint.permitted([10, 9]) == 1
    assert np.flatnonzero(~constraint.allowed([9])).tolist() == [3]
    assert np.flatnonzero(constraint.allowed([0])).tolist() == [1, *range(10, 16)]
    other = grammar.begin()
    constraint.append(9)
    other.append(0)
    assert np.flatnonzero(~constraint.allowed()).tolist() == [3]
    assert np.flatnonzero(other.allowed()).tolist() == [1, *range(10, 16)]
    assert (constraint.permitted([3]), other.permitted([9])) == (0, 0)
