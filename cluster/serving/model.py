"""One replica: an artifact with an engine of its own, behind the application that serves one box."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeAlias

import msgspec
from ray import serve
from ray.util import get_node_ip_address
from starlette.types import Message

from cluster.serving.relay import RelayedRequest, answered
from cluster.serving.scaling import REQUESTS, SLOTS
from runtime.errors import UserError
from runtime.server.api.status import SlotsResponse
from runtime.server.app import application
from runtime.server.endpoints.status import slots_of
from runtime.server.running.served_model import ServedModel
from runtime.server.service import Service
from runtime.server.settings import ServerSettings

REPLICA_HEADER = b"x-replica"  # of each answer
SLOTS_SECONDS = 1.0  # that the engine has to tell of its slots
STATE, METRICS, EACH_SLOT = "state", "metrics", "each slot"  # what a replica reports of itself
Report: TypeAlias = dict[str, Any]  # a `ReplicaState`, Prometheus' text, a `SlotsResponse` or None


class ReplicaState(msgspec.Struct, frozen=True):
    """What one replica does now: requests that it has, of which `waiting` sequences have no slot yet."""

    replica: str
    node: str
    process: int
    capacity: int | None
    slots: int
    requests: int
    waiting: int


class Model:
    """Opens an artifact, and answers what the fronts relay.

    name: the name under which clients ask for the model.
    open_model: opens it in the engine's own thread.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it, and sends no request before
        self, name: str, open_model: Callable[[], ServedModel], settings: ServerSettings
    ) -> None:
        self._service = Service(name, open_model, settings)
        self._app = application(self._service)  # the fronts have checked keys and hosts
        self._service.start()
        await self._service.wait_until_open()
        self.check_health()

    async def answer(self, request: RelayedRequest) -> AsyncGenerator[list[Message]]:
        """The messages of the answer."""
        async for messages in answered(self._app, request):
            for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"].append((REPLICA_HEADER, _replica_name().encode()))
            yield messages

    def check_health(self) -> None:
        """Raise `UserError` if the engine has failed or hangs; Ray then starts another replica in place of this one."""
        health = self._service.health()
        if health.status == "failed":
            raise UserError(f"the model {self._service.name!r} cannot be used: {health.detail}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaler looks at."""
        return {REQUESTS: self._service.running, SLOTS: self._service.generations.slots}

    async def record_routing_stats(self) -> Report:
        """What the replica does now, and its measurements in Prometheus' text format.

        Ray gives a method of this name to routers; here, the fronts ask for it themselves, since Ray answers it also
        while the replica has all the requests that it may have.
        """
        text = self._service.metrics.text().decode()
        return {STATE: self._state(), METRICS: text, EACH_SLOT: await self._slots()}

    def _state(self) -> ReplicaState:
        service = self._service
        return ReplicaState(
            _replica_name(),
            get_node_ip_address(),
            os.getpid(),
            service.capacity,
            service.generations.slots,
            service.running,
            service.waiting,
        )

    async def _slots(self) -> SlotsResponse | None:
        """What each slot does; nothing if the engine, which tells it between two calls, is long in one."""
        try:
            return await asyncio.wait_for(slots_of(self._service), SLOTS_SECONDS)
        except TimeoutError:
            return None

    async def __del__(self) -> None:
        """End the engine's thread; Ray calls this once the last answer is complete."""
        await self._service.drain(asyncio.Event())


def _replica_name() -> str:
    return serve.get_replica_context().replica_id.unique_id
