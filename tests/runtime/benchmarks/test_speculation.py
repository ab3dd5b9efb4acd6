"""Speculation on and off: both texts are compared, and only the time after the first token counts."""

import pytest

from runtime.benchmarks import speculation
from runtime.benchmarks.speculation import SpeculationTask, measure_speculation, speculation_tasks
from runtime.decoding.options import GREEDY
from runtime.errors import UserError
from runtime.text.messages import Message
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock

PROMPT = list(range(20))


def repetitive_model(clock, **changes):
    """Its likeliest next token depends on the last one alone, so that its greedy text soon goes round in circles."""
    return FakeSlotModel(
        clock=clock, seconds=lambda kind, size, rows: 1.0, repeats=1e6, step_rows=(1, 2, 4), cache_len=512, **changes
    )


def test_steps_of_several_tokens_show_as_speed():
    """Calls take a second whatever they hold: off gives a token a second, on as many as its steps hold."""
    clock = SimulatedClock()
    report = measure_speculation(repetitive_model(clock), [SpeculationTask("x", PROMPT, GREEDY, 200)], 3, clock)
    (found,) = report.tasks
    assert found.tokens == 200
    assert found.off_tok_s.median == 1.0
    assert found.on_tok_s.median == found.ratio.median == pytest.approx(found.tokens_per_step)
    assert 2 < found.ratio.median <= 4
    assert found.copied is None


def test_the_share_of_the_text_that_was_copied_is_told():
    clock = SimulatedClock()
    model = repetitive_model(clock)
    (plain,) = measure_speculation(model, [SpeculationTask("x", PROMPT, GREEDY, 40)], 1, clock).tasks
    assert plain.copied is None
    ids = generated(model, clock, 40)
    wrong = [*ids[:30], *[-1] * 10]
    tasks = [SpeculationTask("all", PROMPT, GREEDY, 40, ids), SpeculationTask("some", PROMPT, GREEDY, 40, wrong)]
    report = measure_speculation(model, tasks, 1, clock)
    assert [task.copied for task in report.tasks] == [1.0, 0.75]
    assert [line.split()[-1] for line in report.table().splitlines()] == ["copied", "100%", "75%"]


def generated(model, clock, count):
    return speculation._run(model, SpeculationTask("x", PROMPT, GREEDY, count), False, clock).ids


def test_a_text_that_speculation_changes_is_a_mistake(monkeypatch):
    """Here the model answers differently in every run."""
    clock = SimulatedClock()
    model = repetitive_model(clock)
    original = model.step

    def step(rows):
        return original(rows)[:, ::-1] if len(model.calls) % 7 == 0 else original(rows)

    monkeypatch.setattr(model, "step", step)
    with pytest.raises(AssertionError, match="speculation changed the text of the task 'x'"):
        measure_speculation(model, [SpeculationTask("x", PROMPT, GREEDY, 200)], 1, clock)


def test_targets_on_which_speculation_may_change_ids_are_refused():
    clock = SimulatedClock()
    with pytest.raises(UserError, match="may change ids"):
        measure_speculation(repetitive_model(clock, same_bits=False), [], 1, clock)


def test_the_copying_task_asks_for_the_passage():
    class Words:
        def encode(self, text, *, add_bos=True):
            assert add_bos is False
            return text.split()

    class Chat:
        def encode(self, messages: list[Message]):
            return ["<user>", *messages[0]["content"].split()]

    copy, *free = speculation_tasks(Words(), Chat())
    passage = speculation.PASSAGE.split()
    assert copy.prompt[-len(passage) :] == list(copy.copied) == passage
    assert copy.max_tokens == len(passage)
    assert all(task.copied == () and passage[0] not in task.prompt[:1] for task in free)
