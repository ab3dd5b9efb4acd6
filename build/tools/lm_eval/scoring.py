"""What lm-evaluation-harness asks of a model, answered by an artifact's engine.

The conventions are those of the harness (`TemplateLM` in lm_eval/api/model.py, `HFLM` in lm_eval/models/huggingface.py,
`get_rolling_token_windows` in lm_eval/utils.py), so that results compare with those of others. Nothing here imports it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from build.tools.quality.figures import Distribution
from runtime.decoding.options import SamplingOptions
from runtime.engines.engine import Engine
from runtime.engines.slot_model import Row, step_all
from runtime.errors import UserError
from runtime.scheduling.completions import completions
from runtime.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256  # that the harness lets a model write
MAX_TOKENS_KEYS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the first given one counts
SAMPLING_KEYS = (  # as `SamplingOptions` has them
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


@dataclass(frozen=True)
class Scored:
    """Token ids whose likelihood is asked for, and the ids before them, of which there is at least one."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Generation:
    """How a task wants a text to be written."""

    max_tokens: int
    sampling: SamplingOptions
    stops: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Generation":
        """From the `generation_kwargs` of a task; raises `UserError` for one that is unknown.

        Without `do_sample` or a temperature, the likeliest token is always taken.
        """
        known = {*MAX_TOKENS_KEYS, *SAMPLING_KEYS, "until", "do_sample", "temperature"}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise UserError(
                f"the task sets generation_kwargs.{unknown[0]}, expected some of {', '.join(sorted(known))}; "
                "set others with --gen-kwargs"
            )
        until = settings.get("until") or []
        given = [settings[key] for key in MAX_TOKENS_KEYS if settings.get(key) is not None]
        temperature = settings.get("temperature")
        default = 1.0 if settings.get("do_sample") else 0.0
        sampling = SamplingOptions(
            temperature=0.0 if settings.get("do_sample") is False else default if temperature is None else temperature,
            **{key: settings[key] for key in SAMPLING_KEYS if settings.get(key) is not None},
        )
        stops = [until] if isinstance(until, str) else until
        return cls(int(given[0]) if given else DEFAULT_MAX_TOKENS, sampling, tuple(stop for stop in stops if stop))


@dataclass(frozen=True)
class Scorer:
    """An engine and its tokenizer; `advance` is told how many requests are done after each step."""

    engine: Engine
    tokenizer: Tokenizer
    advance: Callable[[int], None] = field(default=lambda _count: None)

    @property
    def prefix_id(self) -> int:
        """The id before a text without a context: bos, or the end of a text if there is none."""
        spec = self.tokenizer.spec
        found = next((each for each in (spec.bos_id, *spec.eos_ids) if each is not None), None)
        if found is None:
            raise UserError(
                "the artifact's tokenizer has neither bos nor an end of text, one of which must stand before a text; "
                "use tasks whose requests have a context"
            )
        return found

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood, and whether greedy decoding gives it."""
        return self.score([self._encoded(*pair) for pair in pairs])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each whole text behind bos, or behind the end of a text if there is no bos."""
        slots = self._slots()
        windows = [
            list(rolling_windows(self.tokenizer.encode(text, add_bos=False), self.prefix_id, slots)) for text in texts
        ]
        scores = iter(self.score([window for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continue each (context, generation_kwargs) up to a stop string, which is left out.

        A context that leaves too few slots for what may be written loses its beginning.
        """
        groups: dict[Generation, list[int]] = {}
        for index, (_, settings) in enumerate(requests):
            groups.setdefault(Generation.of(settings), []).append(index)
        written = [""] * len(requests)
        for generation, indices in groups.items():
            for index, text in zip(indices, self._write([requests[i][0] for i in indices], generation), strict=True):
                written[index] = text
        return written

    def _write(self, contexts: Sequence[str], generation: Generation) -> list[str]:
        slots = self._slots()
        if slots is not None and generation.max_tokens >= slots:
            raise UserError(
                f"the task writes up to {generation.max_tokens} tokens, expected fewer than the {slots} slots of the "
                "caches; pass --gen-kwargs max_gen_toks=N, or compile with a larger shape.cache_len"
            )
        encoded = [self.tokenizer.encode(context) or [self.prefix_id] for context in contexts]
        prompts = encoded if slots is None else [ids[-(slots - generation.max_tokens) :] for ids in encoded]
        texts = [""] * len(prompts)
        for index, step in completions(
            self.engine,
            prompts,
            generation.sampling,
            max_tokens=generation.max_tokens,
            eos_ids=self.tokenizer.spec.eos_ids,
            texts=[self.tokenizer.text_stream(generation.stops, after=ids) for ids in prompts],
        ):
            texts[index] += step.text or ""
            self.advance(int(step.finish_reason is not None))
        return texts

    def score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether each of its tokens is the likeliest."""
        fitting = [self._fitted(request) for request in requests]
        # the longest first: those side by side are of about the same length
        order = sorted(range(len(fitting)), key=lambda i: (-len(fitting[i].context), -len(fitting[i].continuation)))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(fitting)
        for start in range(0, len(order), self.engine.slots):
            group = order[start : start + self.engine.slots]
            for index, found in zip(group, self._side_by_side([fitting[i] for i in group]), strict=True):
                scores[index] = found
            self.advance(len(group))
        return scores

    def _side_by_side(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """The scores of one group, each in a slot of its own, of which there are enough."""
        engine = self.engine
        totals, greedy = [0.0] * len(rows), [True] * len(rows)
        running = [slot for slot, row in enumerate(rows) if row.continuation]
        for slot in running:
            engine.rewind(slot, 0)
        logits = np.array([engine.feed(slot, rows[slot].context) for slot in running])
        for step in range(max(len(row.continuation) for row in rows)):
            targets = np.array([rows[i].continuation[step] for i in running])
            found = Distribution.of(logits)
            for i, log, same in zip(running, found.log_of(targets), found.top == targets, strict=True):
                totals[i] += float(log)
                greedy[i] &= bool(same)
            # the last token is only predicted
            running = [i for i in running if step + 1 < len(rows[i].continuation)]
            if running:
                logits = step_all(engine, [Row(i, rows[i].continuation[step]) for i in running])
        return list(zip(totals, greedy, strict=True))

    def _encoded(self, context: str, continuation: str) -> Scored:
        """The ids of a pair: spaces at the end of the context belong to the continuation."""
        if not context:
            return Scored([self.prefix_id], self.tokenizer.encode(continuation, add_bos=False))
        before = self.tokenizer.encode(context.rstrip())
        whole = self.tokenizer.encode(context + continuation)
        return Scored(before or [self.prefix_id], whole[len(before) :])

    def _fitted(self, request: Scored) -> Scored:
        """The request, with only as much of its context as the caches hold beside the continuation."""
        slots = self._slots()
        if slots is None or len(request.context) + len(request.continuation) <= slots + 1:
            return request
        if len(request.continuation) > slots:
            raise UserError(
                f"a continuation has {len(request.continuation)} tokens, expected at most the {slots} slots of the "
                "caches; compile with a larger shape.cache_len"
            )
        return Scored(request.context[-(slots + 1 - len(request.continuation)) :], request.continuation)

    def _slots(self) -> int | None:
        """Tokens that a slot's caches hold; None without a limit."""
        self.engine.rewind(0, 0)
        return self.engine.room(0)


def rolling_windows(ids: Sequence[int], prefix_id: int, slots: int | None) -> Iterator[Scored]:
    """Windows that score every id once, each behind as much context as `slots` hold.

    Worked example with 4 slots, ids 0 to 5 and prefix P: 0 1 2 3 behind P, then 4 5 behind 1 2 3.
    """
    longest = len(ids) if slots is None else slots
    whole = [prefix_id, *ids]
    for start in range(0, len(ids), max(longest, 1)):
        end = min(start + longest, len(ids))
        yield Scored(whole[max(end - longest, 0) : start + 1], whole[start + 1 : end + 1])
