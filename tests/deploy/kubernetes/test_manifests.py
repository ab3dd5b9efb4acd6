"""deploy/kubernetes: what kustomize makes of it fits the schemas of Kubernetes, itself, and the server.

Schemas are those of kubernetes-validate, in their strict form, which refuses unknown fields. No cluster takes part.
"""

import copy
import re
import tomllib

import kubernetes_validate
import msgspec
import pytest
import yaml

from export.stage import ROOT
from runtime.server.app import ENDPOINTS
from runtime.server.http.gate import OPEN_PATHS
from runtime.server.process import CLOSING_SECONDS
from runtime.server.service import END_SECONDS
from runtime.server.settings import ServerSettings
from tests.helpers.manifests import MANIFESTS, built, unpack_kubectl

RELEASE = "1.37"
VARIANTS = {"cpu": "base", "cuda": "overlays/cuda"}
RESTRICTED = "pod-security.kubernetes.io/enforce"
KINDS = {
    "Namespace",
    "ConfigMap",
    "Deployment",
    "Service",
    "PodDisruptionBudget",
    "HorizontalPodAutoscaler",
    "NetworkPolicy",
}


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory):
    return unpack_kubectl(tmp_path_factory.mktemp("kubectl"))


@pytest.fixture(scope="module", params=VARIANTS)
def objects(request, kubectl):
    """The objects of a variant by kind, of which each has one."""
    found = built(kubectl, MANIFESTS / VARIANTS[request.param])
    by_kind = {each["kind"]: each for each in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture
def pod(objects):
    return objects["Deployment"]["spec"]["template"]


@pytest.fixture
def container(pod):
    (only,) = pod["spec"]["containers"]
    return only


@pytest.fixture
def settings(objects):
    return msgspec.convert(tomllib.loads(objects["ConfigMap"]["data"]["server.toml"]), ServerSettings)


def flag(container, name):
    """The value of a flag of the server's."""
    return container["args"][container["args"].index(name) + 1]


def selects(selector, labels):
    return selector.items() <= labels.items()


def test_every_object_fits_its_schema(objects):
    assert set(objects) == KINDS
    for each in objects.values():
        kubernetes_validate.validate(each, RELEASE, strict=True)


def test_the_schemas_refuse_what_is_wrong(objects):
    wrong = copy.deepcopy(objects["Deployment"])
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 65
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(wrong, RELEASE, strict=True)


def test_everything_is_in_the_namespace(objects):
    namespace = objects["Namespace"]["metadata"]["name"]
    others = [each for kind, each in objects.items() if kind != "Namespace"]
    assert {each["metadata"]["namespace"] for each in others} == {namespace}


def test_selectors_find_the_pods(objects, pod):
    labels = pod["metadata"]["labels"]
    spread = pod["spec"]["topologySpreadConstraints"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in spread),
    ]
    assert len(selectors) == 5
    assert all(selector and selects(selector, labels) for selector in selectors)


def test_ports_are_those_of_the_container(objects, container, settings):
    (port,) = container["ports"]
    assert port["containerPort"] == settings.port
    probes = [container[name]["httpGet"]["port"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    service = [each["targetPort"] for each in objects["Service"]["spec"]["ports"]]
    allowed = [each["port"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] for each in rule["ports"]]
    assert {*probes, *service, *allowed} == {port["name"]}


def test_probes_ask_what_the_server_answers_without_a_key(container):
    addresses = {each.path for each in ENDPOINTS if each.method == "GET"} & OPEN_PATHS
    asked = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert set(asked.values()) <= addresses


def test_a_pod_has_the_time_to_end_gently(container, pod, settings):
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace > settings.unready_seconds + settings.drain_seconds + END_SECONDS + CLOSING_SECONDS
    readiness = container["readinessProbe"]
    # who asks /ready by itself, such as a gateway, learns of the end before requests are refused
    assert settings.unready_seconds > readiness["periodSeconds"] * readiness["failureThreshold"]


def test_settings_and_keys_are_where_the_server_looks(objects, pod, container, settings):
    assert not settings.only_this_machine
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    folder, _, name = flag(container, "--config").rpartition("/")
    assert mounts[folder]["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert set(objects["ConfigMap"]["data"]) == {name}
    assert flag(container, "--keys-file").startswith("/run/secrets/serving/")
    assert mounts["/run/secrets/serving"]["secret"]["secretName"] == "model-server-keys"
    assert "emptyDir" in mounts["/tmp"]
    assert len(mounts) == len(volumes) == 3


def test_pods_may_do_no_more_than_the_restricted_standard_lets_them(objects, pod, container):
    """Kubernetes' Pod Security Standards, restricted, and more: nothing can be written, no token is there."""
    assert objects["Namespace"]["metadata"]["labels"][RESTRICTED] == "restricted"
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()


def test_the_group_of_the_pod_reads_the_keys(pod):
    (keys,) = [each["secret"] for each in pod["spec"]["volumes"] if "secret" in each]
    assert keys["defaultMode"] == 0o440
    assert pod["spec"]["securityContext"]["fsGroup"] == pod["spec"]["securityContext"]["runAsGroup"]


def test_the_user_is_the_one_of_the_image(pod):
    dockerfile = (ROOT / "deploy" / "container" / "Dockerfile").read_text()
    user, group = re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)[-1]
    given = pod["spec"]["securityContext"]
    assert (given["runAsUser"], given["runAsGroup"]) == (int(user), int(group))


def test_there_is_a_core_for_each_thread(container):
    resources = container["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"] == flag(container, "--threads")


def test_only_the_variant_for_cuda_has_a_gpu(objects, container, request):
    cuda = request.node.callspec.params["objects"] == "cuda"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == cuda
    strategy = objects["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == ({"maxSurge": 0, "maxUnavailable": 1} if cuda else {"maxSurge": 1, "maxUnavailable": 0})


def test_the_autoscaler_asks_for_what_the_adapter_gives(objects):
    autoscaler = objects["HorizontalPodAutoscaler"]["spec"]
    deployment = objects["Deployment"]
    assert autoscaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]  # or each `kubectl apply` would undo what the autoscaler did
    asked = {each["pods"]["metric"]["name"] for each in autoscaler["metrics"]}
    rules = yaml.safe_load((MANIFESTS / "prometheus_adapter.yaml").read_text())["rules"]["custom"]
    assert asked == {rule["name"]["as"] for rule in rules}
    assert "vllm_num_requests_waiting" in asked


def test_prometheus_operator_finds_the_service(objects, kubectl, tmp_path, request):
    folder = tmp_path / "overlay"
    folder.mkdir()
    base, component = (
        (MANIFESTS / name).relative_to(tmp_path.root)
        for name in (VARIANTS[request.node.callspec.params["objects"]], "components/prometheus_operator")
    )
    up = "/".join([".."] * (len(folder.parts) - 1))
    text = f"resources: [{up}/{base}]\ncomponents: [{up}/{component}]\n"
    (folder / "kustomization.yaml").write_text(text)
    (monitor,) = [each for each in built(kubectl, folder) if each["kind"] == "ServiceMonitor"]
    service = objects["Service"]
    assert selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
    assert monitor["metadata"]["namespace"] == service["metadata"]["namespace"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] in {each.path for each in ENDPOINTS} - OPEN_PATHS
    assert endpoint["authorization"]["credentials"].keys() == {"name", "key"}
