"""The application that Ray Serve deploys: `import_path: cluster.serving.application:build`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.serving.front import Front, FrontSettings
from cluster.serving.model import Model
from cluster.serving.router import AffinityRouter
from cluster.serving.settings import FRONT, ClusterSettings, ModelSettings, cluster_settings
from cluster.store.pull import artifact_at
from runtime.server.running.served_model import ServedModel, open_served_model

ENDING_SECONDS = 30  # beyond what the longest request takes
# What a deployment has unless the YAML file's `deployments` says otherwise. A replica takes a few more requests than it
# has slots: what waits beyond that waits in the fronts, and goes to the replica that is free first.
MODEL_OPTIONS: Mapping[str, Any] = {
    "num_replicas": 1,
    "max_ongoing_requests": 8,
    "max_queued_requests": 64,
    "health_check_period_s": 5,
    "ray_actor_options": {"num_cpus": 1},
    "request_router_config": RequestRouterConfig(
        request_router_class=AffinityRouter,
        request_routing_stats_period_s=3600,  # the router needs none; they are the fronts' reports
    ),
}
FRONT_OPTIONS: Mapping[str, Any] = {
    "num_replicas": 1,
    "max_ongoing_requests": 10_000,  # those of the models are the limits
    "ray_actor_options": {"num_cpus": 0},
}


def build(args: dict[str, Any]) -> Application:
    """The application of a YAML file's `args`; raises `UserError` for settings that are wrong."""
    return of_artifacts(cluster_settings(args))


def of_artifacts(settings: ClusterSettings, options: Mapping[str, Any] | None = None) -> Application:
    """As `application`, for the artifacts that the settings name."""
    return application(
        {name: partial(_open, model, Path(settings.cache)) for name, model in settings.models.items()},
        settings,
        options,
    )


def application(
    openers: Mapping[str, Callable[[], ServedModel]],
    settings: ClusterSettings,
    options: Mapping[str, Any] | None = None,
) -> Application:
    """A front for models that `openers` open, each in the process of a replica; `options` are those of every model."""
    models = {
        name: serve.deployment(Model, name=name)
        .options(
            **{
                **MODEL_OPTIONS,
                "graceful_shutdown_timeout_s": settings.request_seconds + ENDING_SECONDS,
                **(options or {}),
            }
        )
        .bind(name, opener, settings.of_replicas(name))
        for name, opener in openers.items()
    }
    own = FrontSettings(settings.keys_file, settings.allowed_hosts, settings.max_body_bytes, settings.request_seconds)
    front = serve.deployment(serve.ingress()(Front), name=FRONT)
    longest = 2 * settings.request_seconds  # as long in a front as later in a replica
    return front.options(graceful_shutdown_timeout_s=longest + ENDING_SECONDS, **FRONT_OPTIONS).bind(models, own)


def _open(model: ModelSettings, cache: Path) -> ServedModel:
    """Open an artifact in a replica, after it was fetched if it is in a store; raises `UserError` as both do."""
    assigned = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
    return open_served_model(artifact_at(model.artifact, cache), model.threads or max(assigned, 1), model.minimum_build)
