"""What all replicas of a cluster are doing, asked of each of them."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.serving.model import ReplicaState
from runtime.server.api.common import ModelCard, ModelList
from runtime.server.api.status import Percentiles, PrefixCacheCounts, RequestCounts, SlotsResponse

ANSWER_SECONDS = 5.0  # that a replica has to answer


class ModelState(msgspec.Struct, frozen=True):
    """The replicas of one model."""

    model: str
    replicas: list[ReplicaState]


class Overview:
    """Asks every replica of every model; one that does not answer is left out."""

    def __init__(self, models: Mapping[str, DeploymentHandle]) -> None:
        self._models = models
        self._created = int(time.time())

    async def states(self) -> list[ModelState]:
        """What each replica does now."""
        return [ModelState(name, await self._ask(name, "state")) for name in self._models]

    async def cards(self) -> ModelList:
        """The models that can be asked for."""
        return ModelList("list", [self._card(state) for state in await self.states()])

    async def slots(self) -> SlotsResponse:
        """The slots of all replicas as those of one server, whose page shows them."""
        return merged_slots([found for name in self._models for found in await self._ask(name, "slots")])

    async def metrics(self) -> bytes:
        """The measurements of all replicas in Prometheus' text format, each with the label `replica`."""
        texts = [found for name in self._models for found in await self._ask(name, "metrics")]
        registry = CollectorRegistry()
        registry.register(_Merged(texts))
        return generate_latest(registry)

    def _card(self, state: ModelState) -> ModelCard:
        capacity = min((each.capacity for each in state.replicas if each.capacity is not None), default=None)
        return ModelCard(state.model, "model", self._created, "local", capacity)

    async def _ask(self, name: str, method: str) -> list[Any]:
        try:
            answers = (
                await self._models[name]
                .broadcast(method)
                .results_async(timeout_s=ANSWER_SECONDS, return_exceptions=True)
            )
        except (RayError, RayServeException, TimeoutError):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def merged_slots(replicas: Sequence[SlotsResponse]) -> SlotsResponse:
    """Several replicas as one server: slots numbered anew, sums of counts and rates, times of the slowest."""
    slots = [slot for each in replicas for slot in each.slots]
    return SlotsResponse(
        ", ".join(dict.fromkeys(each.model for each in replicas)),
        "ready" if replicas else "loading",
        max((each.uptime_seconds for each in replicas), default=0.0),
        [msgspec.structs.replace(slot, id=number) for number, slot in enumerate(slots)],
        sum(each.waiting for each in replicas),
        sum(each.queued_tokens for each in replicas),
        sum(each.generated_tokens_per_second for each in replicas),
        sum(each.prompt_tokens_per_second for each in replicas),
        Percentiles(
            _slowest(each.ttft_seconds.p50 for each in replicas), _slowest(each.ttft_seconds.p99 for each in replicas)
        ),
        PrefixCacheCounts(
            sum(each.prefix_cache.queries for each in replicas), sum(each.prefix_cache.hits for each in replicas)
        ),
        RequestCounts(
            sum(each.requests.running for each in replicas), sum(each.requests.finished for each in replicas)
        ),
    )


def _slowest(seconds: Iterable[float | None]) -> float | None:
    return max((each for each in seconds if each is not None), default=None)


class _Merged:
    """Families of several replicas' texts as one collector."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self._texts = texts

    def collect(self) -> Sequence[Metric]:
        """Each family once, with the samples of all replicas."""
        families: dict[str, Metric] = {}
        for replica, text in self._texts:
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(
                        sample.name, {**sample.labels, "replica": replica}, sample.value, sample.timestamp
                    )
        return list(families.values())
