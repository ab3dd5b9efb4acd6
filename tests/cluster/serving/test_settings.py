"""The settings of a cluster: strict, with sentences that name the place."""

import msgspec
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.serving.settings import ClusterSettings, ModelSettings, cluster_settings
from export.stage import ROOT
from runtime.errors import UserError

MODELS = {"demo": {"artifact": "/srv/models/demo"}}
SHIPPED = ROOT / "deploy/ray/serve.yaml"


def test_defaults():
    settings = cluster_settings({"models": MODELS, "allow_no_keys": True})
    own = settings.of_replicas("demo")
    assert (own.request_seconds, own.max_body_bytes) == (settings.request_seconds, settings.max_body_bytes)
    assert not own.only_this_machine


def test_settings_of_a_replica_are_those_of_a_server():
    models = {"demo": {"artifact": "x", "server": {"stall_budget": 0.2, "max_queued_tokens": 7}}}
    own = cluster_settings({"models": models, "keys_file": "keys"}).of_replicas("demo")
    assert (own.stall_budget, own.max_queued_tokens) == (0.2, 7)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"models": MODELS}, "names no API keys"),
        ({"models": {}, "allow_no_keys": True}, "models is empty"),
        ({"allow_no_keys": True}, "missing required field `models`"),
        ({"models": {"demo": {}}, "allow_no_keys": True}, r"missing required field `artifact` - at `\$.models\[...\]`"),
        ({"models": MODELS, "allow_no_keys": True, "kyes_file": "x"}, "unknown field `kyes_file`"),
        (
            {"models": {"demo": {"artifact": "x", "server": {"port": 1}}}, "allow_no_keys": True},
            "models.demo.server.port is not a replica's to set",
        ),
        (
            {"models": {"demo": {"artifact": "x", "server": {"stal_budget": 1}}}, "allow_no_keys": True},
            "models.demo.server: Object contains unknown field `stal_budget`",
        ),
        (
            {"models": {"front": {"artifact": "x"}}, "allow_no_keys": True},
            "a model is called front, as the deployment that relays is; choose another name",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(args, sentence):
    with pytest.raises(UserError, match=sentence):
        cluster_settings(args)


def test_the_shipped_file_is_as_ray_serve_and_the_settings_expect():
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(SHIPPED.read_text()))
    (app,) = parsed.applications
    settings = cluster_settings(app.args)
    assert {deployment.name for deployment in app.deployments} == {"front", *settings.models}
    assert parsed.http_options.request_timeout_s > 2 * settings.request_seconds


def test_the_page_lists_every_setting():
    text = (ROOT / "docs/deployment.md").read_text()
    own = [field.name for field in msgspec.structs.fields(ClusterSettings)]
    of_models = [f"models.NAME.{field.name}" for field in msgspec.structs.fields(ModelSettings)]
    assert [name for name in own + of_models if f"`{name}`" not in text] == []
