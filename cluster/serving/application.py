"""The application that Ray Serve deploys: `import_path: cluster.serving.application:build`."""

import hashlib
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
from cluster.serving.settings import ClusterSettings, ModelSettings, cluster_settings
from runtime.server.running.served_model import ServedModel, open_served_model
from runtime.server.settings import ServerSettings

FRONT = "front"
ENDING_SECONDS = 30  # beyond the longest request
# What a deployment has unless the YAML file's `deployments` says otherwise. A replica takes few more requests than it
# has slots: what waits beyond that waits in the fronts, and goes to the replica that is free first.
MODEL_OPTIONS: Mapping[str, Any] = {
    "num_replicas": 1,
    "max_ongoing_requests": 8,
    "max_queued_requests": 64,
    "health_check_period_s": 5,
    "ray_actor_options": {"num_cpus": 1},
}
FRONT_OPTIONS: Mapping[str, Any] = {
    "num_replicas": 1,
    "max_ongoing_requests": 10_000,  # those of the models are the limits
    "ray_actor_options": {"num_cpus": 0},
}


def version_of(*parts: object) -> str:
    """What changes if any of the parts does; Ray Serve replaces the replicas of a deployment whose version changes."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def build(args: dict[str, Any]) -> Application:
    """The application of a YAML file's `args`; raises `UserError` for settings that are wrong."""
    settings = cluster_settings(args)
    openers = {name: partial(_open, model, settings.cache) for name, model in settings.models.items()}
    return application(openers, settings)


def application(openers: Mapping[str, Callable[[], ServedModel]], settings: ClusterSettings) -> Application:
    """A front for models that `openers` open, each in the replica's own process."""
    ending = settings.request_seconds + ENDING_SECONDS
    models = {
        name: _deployment(Model, name, MODEL_OPTIONS, ending).bind(name, opener, _replica_settings(settings, name))
        for name, opener in openers.items()
    }
    front = FrontSettings(settings.keys_file, settings.allowed_hosts, settings.max_body_bytes, settings.request_seconds)
    return _deployment(serve.ingress()(Front), FRONT, FRONT_OPTIONS, ending).bind(models, front)


def _deployment(kind: type, name: str, options: Mapping[str, Any], ending: float) -> serve.Deployment:
    router = (
        {"request_router_config": RequestRouterConfig(request_router_class=AffinityRouter)} if kind is Model else {}
    )
    return serve.deployment(kind, name=name).options(graceful_shutdown_timeout_s=ending, **options, **router)


def _replica_settings(settings: ClusterSettings, name: str) -> ServerSettings:
    return settings.of_replicas(name)


def _open(model: ModelSettings, cache: str) -> ServedModel:
    """Open an artifact in a replica; raises `UserError` for one that cannot be used."""
    assigned = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
    return open_served_model(Path(model.artifact), model.threads or max(assigned, 1), model.minimum_build)
