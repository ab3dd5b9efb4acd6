"""Tokens per second with speculation over those without, where a text is copied and where it is not.

Both generate the same ids, which is checked. Prompts are not counted. Each run has a scheduler of its own, which does
not know yet how long calls take, as the first request of a process has.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.benchmarks.one_request import events_of
from runtime.benchmarks.spread import Spread
from runtime.columns import in_columns
from runtime.decoding.options import GREEDY, SamplingOptions
from runtime.engines.slot_model import SlotModel
from runtime.errors import UserError
from runtime.scheduling.requests import Generated, Request
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from runtime.text.messages import Message

if TYPE_CHECKING:
    from runtime.text.conversation_encoder import ConversationEncoder
    from runtime.text.tokenizer import Tokenizer

PASSAGE = (
    "A lighthouse keeper on the northern coast wrote down the weather every morning for forty years. He noted the "
    "direction of the wind, the height of the waves, and the ships that passed. When he retired, his notes filled "
    "sixty books, and the harbour office kept them in a dry room. Years later a student found that they were the only "
    "record of the storms of that time. She copied all of them into a table, and today sailors still use it to plan "
    "their journeys."
)
FREE_QUESTION = "Write a short story about a lighthouse keeper and a lost ship."
FREE_TOKENS = 192
SEED = 0


@dataclass(frozen=True)
class SpeculationTask:
    """A prompt, how it is continued and, if a text is to be copied, its ids."""

    name: str
    prompt: Sequence[int]
    options: SamplingOptions
    max_tokens: int
    copied: Sequence[int] = ()


@dataclass(frozen=True)
class TaskSpeed:
    """Tokens per second with speculation on and off, and their ratio in each pair of runs.

    `tokens_per_step`: of the runs with speculation. `copied`: share of the ids that are those of the text to copy; None
    if none was given.
    """

    name: str
    tokens: int
    off_tok_s: Spread
    on_tok_s: Spread
    ratio: Spread
    tokens_per_step: float
    copied: float | None = None


@dataclass(frozen=True)
class SpeculationReport:
    """The speed of each task."""

    tasks: tuple[TaskSpeed, ...]

    def table(self) -> str:
        """A row for each task."""
        rows = [
            (
                task.name,
                f"{task.off_tok_s.median:,.1f}",
                f"{task.on_tok_s.median:,.1f}",
                f"{task.tokens_per_step:.2f}",
                f"{task.ratio:.2f}",
                "-" if task.copied is None else f"{task.copied:.0%}",
            )
            for task in self.tasks
        ]
        headers = ("text", "tok/s off", "tok/s on", "tokens a step", "on / off (quartiles)", "copied")
        return "\n".join(in_columns([headers, *rows], figures=True))


@dataclass(frozen=True)
class _Run:
    ids: list[int]
    tok_s: float
    tokens_per_step: float


def speculation_tasks(tokenizer: "Tokenizer", encoder: "ConversationEncoder") -> list[SpeculationTask]:
    """A passage that the model is asked to repeat, and a story: its likeliest ids, and drawn ones."""
    passage = tokenizer.encode(PASSAGE, add_bos=False)
    copy, free = (
        encoder.encode([Message(role="user", content=text)])
        for text in (f"Repeat the following text word for word.\n\n{PASSAGE}", FREE_QUESTION)
    )
    return [
        SpeculationTask("copied", copy, GREEDY, len(passage), passage),
        SpeculationTask("free, greedy", free, GREEDY, FREE_TOKENS),
        SpeculationTask("free, temperature 1", free, SamplingOptions(temperature=1.0, seed=SEED), FREE_TOKENS),
    ]


def measure_speculation(
    model: SlotModel, tasks: Sequence[SpeculationTask], repeats: int, clock: Callable[[], float]
) -> SpeculationReport:
    """Run each task without and with speculation, in turn; one round before the repeats does not count.

    Raises `UserError` for a model whose results depend on the call, of which speculation may change ids.
    """
    if not model.same_bits_in_any_call:
        raise UserError("speculation may change ids on this artifact's target, so there is no speed to compare")
    for task in tasks:  # the first touch of code and weights
        _run(model, task, True, clock)
    pairs: dict[str, list[tuple[_Run, _Run]]] = {task.name: [] for task in tasks}
    for repeat, task in itertools.product(range(repeats), tasks):
        order = (False, True) if repeat % 2 == 0 else (True, False)
        runs = {speculate: _run(model, task, speculate, clock) for speculate in order}
        assert runs[False].ids == runs[True].ids, f"speculation changed the text of the task {task.name!r}"
        pairs[task.name].append((runs[False], runs[True]))
    return SpeculationReport(tuple(_speed(task, pairs[task.name]) for task in tasks))


def _run(model: SlotModel, task: SpeculationTask, speculate: bool, clock: Callable[[], float]) -> _Run:
    """Generate all tokens of a task; time counts from the first token, which the prompt's last call gives."""
    scheduler = Scheduler(model, SchedulerSettings(speculate=speculate), clock)
    ids: list[int] = []
    start = end = clock()
    steps_of_prompt = 0
    for event in events_of(scheduler, Request(0, task.prompt, task.max_tokens, task.options)):
        if isinstance(event, Generated):
            end = clock()
            if not ids:
                start, steps_of_prompt = end, scheduler.statistics.steps
            ids.append(event.step.token_id)
    steps = scheduler.statistics.steps - steps_of_prompt
    return _Run(ids, (len(ids) - 1) / (end - start), (len(ids) - 1) / steps)


def _speed(task: SpeculationTask, pairs: Sequence[tuple[_Run, _Run]]) -> TaskSpeed:
    off, on = zip(*pairs, strict=True)
    same = [given == generated for given, generated in zip(task.copied, on[0].ids, strict=False)]
    return TaskSpeed(
        task.name,
        len(on[0].ids),
        Spread.of([run.tok_s for run in off]),
        Spread.of([run.tok_s for run in on]),
        Spread.of([with_drafts.tok_s / plain.tok_s for plain, with_drafts in pairs]),
        sum(run.tokens_per_step for run in on) / len(on),
        sum(same) / len(same) if same else None,
    )
