"""Prompts that run side by side on an engine until all have ended, for commands that know them from the start."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from numpy import float32
from numpy.typing import NDArray

from runtime.decoding.generation import finish_reason_of
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import Sampler
from runtime.engines.slot_model import SlotModel, capacity_of
from runtime.errors import UserError
from runtime.scheduling.prefix_cache import PrefixCache, check_fits, reuse_mode
from runtime.scheduling.requests import Failed, Generated, Request
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from runtime.text.stream import Step, TextStream, with_text


@runtime_checkable
class DrawingSlots(SlotModel, Protocol):
    """A model that can draw ids by itself, so that it need not wait for its caller to read them."""

    def can_draw(self, options: SamplingOptions) -> bool:
        """Whether it can draw with these options."""

    def feed(self, slot: int, ids: Sequence[int]) -> NDArray[float32]:
        """Append any number of ids to a slot; returns logits (vocab,) after the last."""

    def draw(self, slot: int, token_id: int, sampler: Sampler, steps: int) -> Iterator[int]:
        """Yield `steps` ids that follow `token_id` in a slot, and append each to the sampler's text before."""


def completions(
    model: SlotModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    logprobs: int | None = None,
    texts: Sequence[TextStream] = (),
    settings: SchedulerSettings | None = None,
) -> Iterator[tuple[int, Step]]:
    """Steps of all prompts, each with its prompt's index; as many prompts run at a time as the model has slots.

    Each prompt ends by itself: at an end of sequence, a stop string, `max_tokens`, or when its slot is full. Prompt i
    has the options' seed plus i, and goes on from what a slot holds of it. `texts`, one per prompt, add text to the
    steps. Raises `UserError` before the first step if any prompt is empty or does not fit.
    """
    requests = [
        Request(i, prompt, max_tokens, options.numbered(i), eos_ids, logprobs) for i, prompt in enumerate(prompts)
    ]
    for number, request in enumerate(requests, 1):
        check_fits(request.prompt_ids, capacity_of(model), f"prompt {number}" if len(requests) > 1 else "the prompt")
    if len(requests) == 1 and logprobs is None and isinstance(model, DrawingSlots) and model.can_draw(options):
        mode = reuse_mode(model, settings or SchedulerSettings())
        steps = _drawn_by_device(model, requests[0], PrefixCache(model, mode, snapshot_bytes=0))
        return ((0, step) for step in (with_text(steps, texts[0]) if texts else steps))
    return _scheduled(Scheduler(model, settings or SchedulerSettings(), time.perf_counter), requests, texts)


def _scheduled(
    scheduler: Scheduler, requests: Sequence[Request], texts: Sequence[TextStream]
) -> Iterator[tuple[int, Step]]:
    """Steps of all requests, whose ids are their indices; a request whose text has ended is cancelled."""
    assert len(texts) in (0, len(requests))
    for request in requests:
        scheduler.submit(request)
    ended = set()
    while scheduler.has_work:
        for event in scheduler.turn():
            if isinstance(event, Failed):
                raise UserError(event.error)
            if not isinstance(event, Generated) or event.request_id in ended:
                continue
            index = int(event.request_id)  # type: ignore[call-overload]
            step = next(with_text(iter((event.step,)), texts[index])) if texts else event.step
            if step.finish_reason is not None:
                ended.add(index)
                scheduler.cancel(index)
            yield index, step


def _drawn_by_device(model: DrawingSlots, request: Request, prefixes: PrefixCache) -> Iterator[Step]:
    """Steps of one request, drawn by the model's device."""
    prompt = list(request.prompt_ids)
    slot, reused = prefixes.take(prompt)
    sampler = Sampler(request.options, prompt)
    first = sampler.sample(model.feed(slot, prompt[reused.tokens :]))
    sampler.append(first)
    room = model.room(slot)
    most = request.max_tokens if room is None else min(request.max_tokens, room + 1)
    ids = itertools.chain([first], model.draw(slot, first, sampler, most - 1))
    for left, token_id in zip(range(most, 0, -1), ids, strict=False):
        step = Step(token_id, finish_reason=finish_reason_of(token_id, left, request.eos_ids))
        yield step
        if step.finish_reason is not None:
            return
