"""Measurements under the names that vLLM uses, which dashboards and gateways expect, in Prometheus' text format.

The names are those of vllm/v1/metrics/loggers.py (vLLM, commit 005a810).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.scheduling.requests import Event, Generated, Request
from runtime.scheduling.statistics import Statistics
from runtime.server.api.status import Health
from runtime.server.running.generations import Times
from runtime.server.running.places import Queue

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
LAST_REQUESTS = 512  # of which percentiles are shown
RATE_SECONDS = 10.0  # over which rates are shown
REFUSALS = (429, 503)  # statuses that tell a client to come back


@dataclass(frozen=True)
class Counter:
    """A count of the scheduler's, as Prometheus is told it."""

    name: str
    what: str
    read: Callable[[Statistics], int]


COUNTERS = (
    Counter("vllm:prompt_tokens", "Prompt tokens that were computed", lambda s: s.prompt_tokens),
    Counter("vllm:generation_tokens", "Generated tokens", lambda s: s.generated_tokens),
    Counter("vllm:prefix_cache_queries", "Prompt tokens looked for in slots and snapshots", lambda s: s.prefix_queries),
    Counter("vllm:prefix_cache_hits", "Prompt tokens found there", lambda s: s.prefix_hits),
    Counter("vllm:spec_decode_num_draft_tokens", "Guessed tokens that were checked", lambda s: s.drafts_proposed),
    Counter("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right", lambda s: s.drafts_accepted),
)


class Metrics:
    """Measurements of one model; read and written in the event loop's thread."""

    def __init__(
        self, model: str, statistics: Callable[[], Statistics], queue: Queue, health: Callable[[], Health]
    ) -> None:
        self._model = model
        self._statistics = statistics
        self._health = health
        self._queue = queue
        self._slots = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._finished: dict[str, int] = {}
        self._refused: dict[int, int] = dict.fromkeys(REFUSALS, 0)  # from 0, so that the first one is an increase
        self._ttft: deque[float] = deque(maxlen=LAST_REQUESTS)
        self._counts: deque[tuple[float, int, int]] = deque()
        self._time_to_first = self._seconds("time_to_first_token_seconds", "From arrival to the first token")
        self._per_token = self._seconds("time_per_output_token_seconds", "Between two tokens, a mean for each choice")
        self._in_all = self._seconds("e2e_request_latency_seconds", "From arrival to the end")
        self._queued = self._seconds("request_queue_time_seconds", "From arrival to a slot")
        self._prefill = self._seconds("request_prefill_time_seconds", "From a slot to the first token")
        self._decode = self._seconds("request_decode_time_seconds", "From the first token to the last")
        self._prompts = self._tokens("request_prompt_tokens", "Tokens of a prompt")
        self._answers = self._tokens("request_generation_tokens", "Tokens of an answer")
        self._iterations = self._tokens("iteration_tokens_total", "Generated tokens of a call of the model")

    def set_slots(self, slots: int) -> None:
        """Say how many sequences the model holds."""
        self._slots = slots

    def step_done(self, events: Sequence[Event]) -> None:
        """Take what a call of the model gave."""
        generated = sum(isinstance(event, Generated) for event in events)
        if generated:
            self._iterations.observe(generated)

    def choice_over(self, request: Request, times: Times, reason: str) -> None:
        """Take a choice that is over, with the reason of its end."""
        self._finished[reason] = self._finished.get(reason, 0) + 1
        if times.started is not None:
            self._queued.observe(times.started - times.arrived)
        if times.first_token is None or times.started is None or times.last_token is None:
            return
        self._ttft.append(times.first_token - times.arrived)
        self._time_to_first.observe(times.first_token - times.arrived)
        self._prefill.observe(times.first_token - times.started)
        self._decode.observe(times.last_token - times.first_token)
        if times.generated > 1:
            self._per_token.observe((times.last_token - times.first_token) / (times.generated - 1))
        self._in_all.observe((times.ended or times.last_token) - times.arrived)
        self._prompts.observe(len(request.prompt_ids))
        self._answers.observe(times.generated)

    def text_over(self, times: Times, tokens: int, reason: str) -> None:
        """Take a text of so many tokens that went through a head that generates none."""
        self._finished[reason] = self._finished.get(reason, 0) + 1
        if times.started is None or times.ended is None:
            return
        self._queued.observe(times.started - times.arrived)
        self._in_all.observe(times.ended - times.arrived)
        self._prompts.observe(tokens)

    def refused(self, status: int) -> None:
        """Take a request that was refused with this status by the address that it was sent to."""
        self._refused[status] = self._refused.get(status, 0) + 1

    def ttft(self, share: float) -> float | None:
        """The time to the first token that this share of the last requests stayed below; None before the first."""
        return float(np.quantile(self._ttft, share)) if self._ttft else None

    def rates(self) -> tuple[float, float]:
        """Generated tokens and computed prompt tokens per second, over the last seconds in which this was asked."""
        now, counts = time.monotonic(), self._statistics()
        self._counts.append((now, counts.generated_tokens, counts.prompt_tokens))
        while len(self._counts) > 2 and now - self._counts[1][0] > RATE_SECONDS:
            self._counts.popleft()
        then, generated, prompt = self._counts[0]
        passed = now - then
        if passed <= 0:
            return 0.0, 0.0
        return (counts.generated_tokens - generated) / passed, (counts.prompt_tokens - prompt) / passed

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The counts and gauges, which the scheduler keeps; called by the registry."""
        counts, state = self._statistics(), self._health().status
        labels, values = ["model_name"], [self._model]
        for counter in COUNTERS:
            family = CounterMetricFamily(counter.name, counter.what, labels=labels)
            family.add_metric(values, counter.read(counts))
            yield family
        used = counts.running / self._slots if self._slots else 0.0
        for name, what, value in (
            ("vllm:num_requests_running", "Sequences with a slot", counts.running),
            ("vllm:num_requests_waiting", "Sequences without a slot", self._queue.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the slots that are in use", used),
            ("queued_prompt_tokens", "Prompt tokens of the sequences without a slot", self._queue.queued_tokens),
            ("server_ready", "1 while requests are taken, as /ready says", float(state == "ready")),
            ("server_healthy", "0 once the engine has failed or hangs, as /health says", float(state != "failed")),
        ):
            gauge = GaugeMetricFamily(name, what, labels=labels)
            gauge.add_metric(values, value)
            yield gauge
        finished = CounterMetricFamily(
            "vllm:request_success", "Sequences that are over", labels=[*labels, "finished_reason"]
        )
        for reason, count in self._finished.items():
            finished.add_metric([*values, reason], count)
        yield finished
        refused = CounterMetricFamily("refused_requests", "Requests that were refused", labels=[*labels, "status"])
        for status, count in self._refused.items():
            refused.add_metric([*values, str(status)], count)
        yield refused

    def _seconds(self, name: str, what: str) -> Histogram:
        return self._histogram(name, what, SECONDS)

    def _tokens(self, name: str, what: str) -> Histogram:
        return self._histogram(name, what, TOKENS)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", what, ["model_name"], registry=self._registry, buckets=buckets)
        return family.labels(self._model)
