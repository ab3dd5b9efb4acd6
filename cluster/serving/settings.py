"""The settings of a cluster: the `args` of the application in Ray Serve's YAML file."""

from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec

from runtime.errors import UserError
from runtime.server.settings import MEGABYTE, Count, Seconds, ServerSettings

Kind = TypeVar("Kind")
FRONT = "front"  # the deployment that takes requests, beside those of the models
# settings of a server that are the front's or Ray Serve's here
NOT_OF_REPLICAS = frozenset(
    {
        "host",
        "port",
        "model_name",
        "keys_file",
        "allow_no_keys",
        "allowed_hosts",
        "tls_certificate",
        "tls_key",
        "max_body_bytes",
        "request_seconds",
    }
)


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model.

    artifact: a folder that each node has, or an address in a store, such as s3://bucket/models/demo.
    threads: CPU threads of a replica; the CPUs that Ray gives it by default.
    minimum_build: the lowest build number that is taken.
    server: settings of docs/serving.md for each replica, such as max_queued_tokens or stall_budget.
    """

    artifact: str
    threads: Count | None = None
    minimum_build: Annotated[int, msgspec.Meta(ge=0)] = 0
    server: Mapping[str, object] = {}


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, by its name in the file.

    models: each model by the name that clients use, which is also the name of its deployment.
    keys_file: a file with one API key a line, on each node with a front; each request must then carry one of them.
    allow_no_keys: take requests without keys.
    allowed_hosts: names under which clients reach the cluster; any if there is none.
    cache: folder of each node for artifacts from a store.
    max_body_bytes: largest body of a request.
    request_seconds: how long a request may take.
    """

    models: Mapping[str, ModelSettings]
    keys_file: str | None = None
    allow_no_keys: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cache: str = "/var/cache/mistral-aot"
    max_body_bytes: Count = 8 * MEGABYTE
    request_seconds: Seconds = 600.0

    def of_replicas(self, name: str) -> ServerSettings:
        """The settings of each replica of a model; raises `UserError` for one that is wrong."""
        given = self.models[name].server
        for wrong in sorted(NOT_OF_REPLICAS & set(given)):
            raise UserError(
                f"models.{name}.server.{wrong} is not a replica's to set; set it beside `models`, or in Ray Serve's "
                "http_options"
            )
        # the fronts check hosts and keys before a request comes to a replica, which listens nowhere
        own = {"host": "0.0.0.0", "allow_no_keys": True}
        limits = {"max_body_bytes": self.max_body_bytes, "request_seconds": self.request_seconds}
        settings = _converted({**given, **own, **limits}, ServerSettings, f"models.{name}.server")
        settings.check()
        return settings


def cluster_settings(args: Mapping[str, object]) -> ClusterSettings:
    """The settings of an application's `args`; raises `UserError` for what does not fit."""
    settings = _converted(args, ClusterSettings, "args")
    if not settings.models:
        raise UserError("args.models is empty, expected a name and an artifact for each model")
    if FRONT in settings.models:
        raise UserError(f"a model is called {FRONT}, as the deployment that relays is; choose another name")
    if settings.keys_file is None and not settings.allow_no_keys:
        raise UserError(
            "args names no API keys; name a keys_file, or set allow_no_keys if everyone who reaches the cluster may "
            "use the models"
        )
    for name in settings.models:
        settings.of_replicas(name)
    return settings


def _converted(fields: Mapping[str, object], kind: type[Kind], place: str) -> Kind:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{place}: {error}; docs/deployment.md lists every setting") from error
