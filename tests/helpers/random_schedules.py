"""Random requests at random times, and what each must give: the tokens that it gives alone on a fresh model.

Everything works with any `SlotModel`.
"""

from dataclasses import dataclass, field

import numpy as np

from runtime.decoding.generation import row_samplers
from runtime.decoding.logprobs import row_logprobs
from runtime.decoding.options import SamplingOptions
from runtime.engines.slot_model import Row
from runtime.errors import UserError
from runtime.scheduling.requests import Ended, Failed, Generated, Request, Started
from runtime.text.stream import Step

MANY_TURNS = 100_000  # more than any schedule needs: one that takes them stands still


@dataclass(frozen=True)
class Arrival:
    """A request, the turn before which it is submitted, and the turn before which it is cancelled, if it is."""

    turn: int
    request: Request
    cancelled: int | None = None


@dataclass(frozen=True)
class Schedule:
    """How requests are made: their number, the longest prompt, and the ids that they use."""

    requests: int = 12
    longest_prompt: int = 64
    most_tokens: int = 40
    ids: int = 24
    spread: int = 60  # turns over which they arrive
    most_choices: int = 3
    logprobs: int | None = None


def random_schedule(seed, new_model, shape=Schedule()):
    """Prompts that begin like earlier ones, go on from what earlier ones give, or begin like nothing before."""
    random = np.random.default_rng(seed)
    arrivals, prompts = [], [random_ids(random, shape, shape.longest_prompt)]
    for number in range(shape.requests):
        prompt = random_prompt(random, shape, prompts)
        turn = int(random.integers(shape.spread))
        request = Request(
            number,
            prompt,
            int(random.integers(1, shape.most_tokens + 1)),
            random_options(random),
            eos_ids=(int(random.integers(shape.ids)),) if random.random() < 0.5 else (),
            logprobs=shape.logprobs,
            choices=int(random.integers(1, shape.most_choices + 1)) if random.random() < 0.3 else 1,
        )
        cancelled = turn + int(random.integers(60)) if random.random() < 0.2 else None
        arrivals.append(Arrival(turn, request, cancelled))
        prompts += [prompt, prompt + alone(new_model(), request)[0]]
    return arrivals


def random_prompt(random, shape, earlier):
    old = earlier[random.integers(len(earlier))]
    match random.integers(5):
        case 0:
            prompt = random_ids(random, shape, random.integers(1, shape.longest_prompt + 1))
        case 1:
            prompt = old
        case 2 | 3:  # as the next turn of a conversation
            prompt = old + random_ids(random, shape, random.integers(1, 10))
        case _:
            prompt = old[: random.integers(len(old) + 1)] + random_ids(random, shape, random.integers(1, 20))
    return prompt[: shape.longest_prompt]


def random_ids(random, shape, count):
    return random.integers(shape.ids, size=count).tolist()


def random_options(random):
    if random.random() < 0.4:
        return SamplingOptions(repetition_penalty=1.3 if random.random() < 0.3 else None, logit_bias={1: 0.5})
    return SamplingOptions(
        temperature=float(random.choice([0.3, 1.0])),
        top_k=int(random.integers(2, 10)) if random.random() < 0.5 else None,
        top_p=0.9 if random.random() < 0.5 else None,
        repetition_penalty=1.2 if random.random() < 0.3 else None,
        frequency_penalty=0.7 if random.random() < 0.3 else None,
        seed=int(random.integers(1000)),
    )


def alone(model, request, choice=0):
    """The tokens of one choice, and the reason of their end, on a fresh model that nobody else uses."""
    steps, end = alone_steps(model, request, choice)
    return [step.token_id for step in steps], end


def alone_steps(model, request, choice=0):
    """As `alone`, with log probabilities.

    The prompt is fed by the largest chunks, and every token by a step of its own.
    """
    sampler = row_samplers(request.options, request.choices, request.grammar)[choice]
    sampler.begin(request.prompt_ids)
    prompt = list(request.prompt_ids)
    for start in range(0, len(prompt), model.chunks[0]):
        logits = model.prefill(0, prompt[start : start + model.chunks[0]])
    steps = []
    for left in range(request.max_tokens, 0, -1):
        try:
            drawn = sampler.sample(logits)
        except UserError:
            return steps, "failed"
        sampler.append(drawn)
        full = left == 1 or model.room(0) == 0
        end = "stop" if drawn in request.eos_ids else "length" if full else None
        logprobs = None if request.logprobs is None else row_logprobs(logits[None], [0], [request.logprobs])[0].top
        steps.append(Step(drawn, logprobs, end))
        if steps[-1].finish_reason is not None:
            break
        (logits,) = model.step([Row(0, steps[-1].token_id)])
    return steps, steps[-1].finish_reason


@dataclass
class Run:
    """What came of a schedule, by (request, choice)."""

    steps: dict = field(default_factory=dict)
    ends: dict = field(default_factory=dict)
    started: dict = field(default_factory=dict)

    @property
    def tokens(self):
        return {key: [step.token_id for step in steps] for key, steps in self.steps.items()}


def run_schedule(scheduler, arrivals):
    """Runs a schedule to its end and checks the order of events."""
    run = Run()
    for turn in range(MANY_TURNS):
        for arrival in arrivals:
            if arrival.turn == turn:
                scheduler.submit(arrival.request)
            if arrival.cancelled == turn:
                scheduler.cancel(arrival.request.request_id)
        for event in scheduler.turn():
            note(run, event)
        if not scheduler.has_work and all(arrival.turn <= turn for arrival in arrivals):
            return run
    raise AssertionError("the scheduler stands still")


def note(run, event):
    key = event.request_id, event.choice
    assert key not in run.ends, "nothing follows the end"
    match event:
        case Started():
            assert key not in run.started
            run.started[key] = event
            run.steps[key] = []
        case Generated():
            run.steps[key].append(event.step)
        case Ended():
            run.ends[key] = event.reason
        case Failed():
            run.ends[key] = "failed"


def all_alone(new_model, arrivals):
    """What each choice gives alone, by (request, choice)."""
    return {
        (arrival.request.request_id, choice): alone_steps(new_model(), arrival.request, choice)
        for arrival in arrivals
        for choice in range(arrival.request.choices)
    }


def check_run(run, expected):
    """Every choice has the steps that it has alone; a cancelled one the first of them.

    Steps hold log probabilities for requests that ask for them: in those of all ids, any other bit of the logits shows.
    """
    assert set(run.ends) == set(expected)
    for key, (steps, reason) in expected.items():
        got = run.steps.get(key, [])
        if run.ends[key] == "cancelled":
            assert got == steps[: len(got)], key
        else:
            assert (got, run.ends[key]) == (steps, reason), key
