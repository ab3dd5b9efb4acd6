"""One replica: an artifact with an engine of its own, behind the application that serves one box."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable

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

    def state(self) -> ReplicaState:
        """What the replica does now."""
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

    async def slots(self) -> SlotsResponse:
        """What each slot does."""
        return await slots_of(self._service)

    def metrics(self) -> tuple[str, str]:
        """The replica's name, and its measurements in Prometheus' text format."""
        return _replica_name(), self._service.metrics.text().decode()

    async def __del__(self) -> None:
        """End the engine's thread; Ray calls this once the last answer is complete."""
        await self._service.drain(asyncio.Event())


def _replica_name() -> str:
    return serve.get_replica_context().replica_id.unique_id
