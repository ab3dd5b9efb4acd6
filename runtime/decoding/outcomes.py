"""Generations that a command has collected: their steps, their timings, and how both are shown."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from runtime.text.replies import Reply
from runtime.text.stream import Step


@dataclass(frozen=True)
class Timings:
    """Seconds and rates of one generation; None if too little was generated to measure."""

    load_s: float
    ttft_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None


@dataclass(frozen=True)
class Outcome:
    """A whole generation; `finish_reason` is that of the last step, or "interrupted"."""

    steps: tuple[Step, ...]
    prompt_tokens: int
    finish_reason: str
    timings: Timings


def collect(
    steps: Iterator[tuple[int, Step]],
    prompt_tokens: Sequence[int],
    load_s: float,
    show: Callable[[int, Step], None],
    *,
    slots: int = 1,
) -> list[Outcome]:
    """Show each step, which comes with its prompt's index, and time them all; Ctrl-C ends the collection only.

    `prompt_tokens` are the lengths of the prompts. They run in so many `slots`: a prompt's time begins when one is
    free for it.
    """
    starts = [time.perf_counter()] * slots
    taken: list[list[Step]] = [[] for _ in prompt_tokens]
    times: list[list[float]] = [[] for _ in prompt_tokens]
    with contextlib.suppress(KeyboardInterrupt):
        for index, step in steps:
            now = time.perf_counter()
            times[index].append(now)
            taken[index].append(step)
            if step.finish_reason is not None:
                starts.append(now)
            show(index, step)
    return [
        Outcome(
            tuple(made),
            count,
            _finish_reason(made),
            _timings(starts[min(i, len(starts) - 1)], at, count, load_s),
        )
        for i, (made, at, count) in enumerate(zip(taken, times, prompt_tokens, strict=True))
    ]


def _finish_reason(steps: Sequence[Step]) -> str:
    return (steps[-1].finish_reason if steps else None) or "interrupted"


def _timings(start: float, times: list[float], prompt_tokens: int, load_s: float) -> Timings:
    if not times:
        return Timings(load_s, None, None, None)
    ttft_s = times[0] - start
    decode_tok_s = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return Timings(load_s, ttft_s, prompt_tokens / ttft_s, decode_tok_s)


def as_json(outcome: Outcome, reply: Reply | None) -> dict[str, object]:
    """The object that `--json` prints.

    `text` is null without a tokenizer, for which there is no `reply`; `reasoning` and `tool_calls` are there if the
    reply has them; `logprobs`, if requested, is a list of [id, logprob] per step.
    """
    called = reply is not None and bool(reply.tool_calls)
    fields: dict[str, object] = {
        "text": reply.text if reply else None,
        **({"reasoning": reply.reasoning} if reply and reply.reasoning is not None else {}),
        **({"tool_calls": list(reply.tool_calls)} if reply and called else {}),
        "token_ids": [step.token_id for step in outcome.steps],
        "prompt_tokens": outcome.prompt_tokens,
        "finish_reason": "tool_calls" if called and outcome.finish_reason == "stop" else outcome.finish_reason,
        "timings": asdict(outcome.timings),
    }
    logprobs = [step.logprobs for step in outcome.steps if step.logprobs is not None]
    return {**fields, "logprobs": logprobs} if logprobs else fields


def summary(outcome: Outcome) -> str:
    """One line for people: times, rates and the finish reason."""
    t = outcome.timings
    parts = [f"load {t.load_s:.2f} s"]
    if t.ttft_s is not None:
        parts.append(f"TTFT {1000 * t.ttft_s:.0f} ms")
        parts.append(f"prompt {outcome.prompt_tokens} tokens at {t.prefill_tok_s:.1f} tok/s")
    if t.decode_tok_s is not None:
        parts.append(f"{len(outcome.steps)} tokens at {t.decode_tok_s:.1f} tok/s")
    return " | ".join([*parts, outcome.finish_reason])
