"""Ray Serve's choice of a replica: the one that has probably seen the prompt before, unless that one is busier."""

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.serving.affinity import preferred
from cluster.serving.relay import RelayedRequest

SLACK = 2  # requests that a preferred replica may have more than the least busy one


class AffinityRouter(RequestRouter):
    """Ranks the replicas of a deployment; Ray asks them in this order, and goes on from one that is full.

    `slack` is how many requests a preferred replica may have more than the least busy one. A large one keeps
    conversations where they are, 0 spreads the load evenly.
    """

    def initialize_state(self, slack: int = SLACK) -> None:
        """Take the settings that the deployment's `request_router_kwargs` name."""
        self._slack = slack

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; of a rank, Ray takes the one with the fewest requests.

        Ray calls this again after a while if none takes the request.
        """
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # every replica is in the ranks
        first = self._preferred(candidate_replicas, _key(pending_request))
        return [[first], candidate_replicas] if first is not None else [candidate_replicas]

    def _preferred(self, candidates: Sequence[RunningReplica], key: str) -> RunningReplica | None:
        if not key:
            return None
        by_name = {replica.replica_id.unique_id: replica for replica in candidates}
        busy = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        name = preferred(key, by_name)[0]
        return by_name[name] if busy[name] <= min(busy.values()) + self._slack else None


def _key(pending: PendingRequest | None) -> str:
    arguments: list[Any] = [] if pending is None else list(pending.args)
    return arguments[0].affinity if arguments and isinstance(arguments[0], RelayedRequest) else ""
