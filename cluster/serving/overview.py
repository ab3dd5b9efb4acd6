"""What all replicas of a cluster are doing, asked of each of them."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import ReplicaID
from ray.util import list_named_actors

from cluster.serving.model import EACH_SLOT, METRICS, STATE, ReplicaState, Report
from runtime.server.api.common import ModelCard, ModelList
from runtime.server.api.status import Percentiles, PrefixCacheCounts, RequestCounts, SlotsResponse

NAMESPACE = "serve"  # of the actors of Ray Serve
ANSWER_SECONDS = 2.0  # that a replica has to answer; probes of load balancers commonly wait 5 s or less


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
        return [ModelState(name, [each[STATE] for each in found]) for name, found in (await self._reports()).items()]

    async def cards(self) -> ModelList:
        """The models that can be asked for."""
        return ModelList("list", [self._card(state) for state in await self.states()])

    async def slots(self) -> SlotsResponse:
        """The slots of all replicas as those of one server, whose page shows them."""
        reports = [report for found in (await self._reports()).values() for report in found]
        return merged_slots([report[EACH_SLOT] for report in reports if report[EACH_SLOT] is not None])

    async def metrics(self) -> bytes:
        """The measurements of all replicas in Prometheus' text format, each with the label `replica`."""
        reports = [report for found in (await self._reports()).values() for report in found]
        registry = CollectorRegistry()
        registry.register(_Merged([(report[STATE].replica, report[METRICS]) for report in reports]))
        return generate_latest(registry)

    def _card(self, state: ModelState) -> ModelCard:
        capacity = min((each.capacity for each in state.replicas if each.capacity is not None), default=None)
        return ModelCard(state.model, "model", self._created, "local", capacity)

    async def _reports(self) -> dict[str, list[Report]]:
        """What each replica of each model reports."""
        replicas = await asyncio.to_thread(_replicas)
        of_models = {
            name: [actor for of, actor in replicas if _is_of(of, handle)] for name, handle in self._models.items()
        }
        found = await asyncio.gather(*(_reports_of(actors) for actors in of_models.values()))
        return dict(zip(of_models, found, strict=True))


def _replicas() -> list[tuple[ReplicaID, str]]:
    """The replicas of this cluster, each with the name of its actor.

    A handle's `broadcast` asks them too, but waits until a full replica has a place, and then has no answer at all if
    one replica gives none.
    """
    names = [each["name"] for each in list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]
    return [(ReplicaID.from_full_id_str(name), name) for name in names if ReplicaID.is_full_id_str(name)]


def _is_of(replica: ReplicaID, handle: DeploymentHandle) -> bool:
    deployment = replica.deployment_id
    return (deployment.app_name, deployment.name) == (handle.app_name, handle.deployment_name)


async def _reports_of(actors: Sequence[str]) -> list[Report]:
    found = await asyncio.gather(*(_report(actor) for actor in actors), return_exceptions=True)
    return [report for report in found if not isinstance(report, BaseException)]


async def _report(actor: str) -> Report:
    """What a replica reports; raises what Ray does if it has not started or is gone, and `TimeoutError`."""
    handle = await asyncio.to_thread(ray.get_actor, actor, NAMESPACE)
    async with asyncio.timeout(ANSWER_SECONDS):
        return await handle.record_routing_stats.remote()


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
