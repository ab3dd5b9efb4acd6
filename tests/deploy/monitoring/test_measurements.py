"""The dashboard, the alerts and the autoscaler's adapter ask only for what `/metrics` prints; promtool finds no fault.

promtool is Prometheus' own, which also runs the alerts over made-up series (deploy/prometheus/alerts_test.yml).
"""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from export.stage import ROOT
from runtime.server.app import ENDPOINTS
from runtime.server.http.gate import OPEN_PATHS
from runtime.server.settings import ServerSettings
from tests.helpers.manifests import MANIFESTS
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import running

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
ALERTS = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
ADAPTER = yaml.safe_load((MANIFESTS / "prometheus_adapter.yaml").read_text())["rules"]["custom"]
OF_PROMETHEUS = {"up"}  # which it adds for each target
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "offset"}
# what stands in a query and names no metric: strings, labels in braces, ranges, lists of labels, functions
NO_METRICS = (
    r'"(?:[^"\\]|\\.)*"',
    r"\{[^{}]*\}",
    r"\[[^\[\]]*\]",
    r"\b(?:by|on|without|ignoring)\s*\([^()]*\)",
    r"\b[a-z_]+(?=\s*\()",
)
PATIENCE = 30  # seconds


def metrics_of(query):
    """The names of the metrics in a query of Prometheus'."""
    for pattern in NO_METRICS:
        query = re.sub(pattern, " ", query)
    return set(re.findall(r"(?<![\w.$])[a-zA-Z_:][\w:]*", query)) - WORDS


def queries_of(part):
    """Every query of a dashboard."""
    if isinstance(part, dict):
        own = [part["expr"]] if "expr" in part else []
        return own + [each for value in part.values() for each in queries_of(value)]
    return [each for value in part for each in queries_of(value)] if isinstance(part, list) else []


@pytest.fixture(scope="module")
def printed():
    """The names of the samples that a server prints after its first answer."""
    with running(scripted("Bonjour")) as server:
        assert server.chat(max_tokens=3).status == 200
        text = server.ask("/metrics").body.decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def promtool(*arguments):
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_names_are_found_in_queries():
    query = 'histogram_quantile(0.99, sum by (job, le) (rate(a:b_bucket{le="c"}[5m]))) > 1e3 and on (job) up == 0'
    assert metrics_of(query) == {"a:b_bucket", "up"}


@pytest.mark.parametrize(
    ("queries", "least"),
    [
        (queries_of(DASHBOARD), 14),
        ([alert["expr"] for alert in ALERTS], 9),
        ([rule["seriesQuery"] for rule in ADAPTER], 2),
    ],
    ids=["dashboard", "alerts", "adapter"],
)
def test_only_what_the_server_prints_is_asked_for(printed, queries, least):
    asked = {name for query in queries for name in metrics_of(query)}
    assert len(asked) >= least
    assert asked - OF_PROMETHEUS <= printed


def test_every_panel_of_the_dashboard_asks_for_something_of_its_own():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["targets"]
        assert all("$model" in target["expr"] for target in panel["targets"]), panel["title"]


def test_the_dashboard_lists_models_by_a_metric_that_there_is(printed):
    (query,) = [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["name"] == "model"]
    assert re.fullmatch(r"label_values\(([\w:]+), model_name\)", query)[1] in printed


def test_promtool_takes_the_configuration(tmp_path):
    key = tmp_path / "metrics_key"
    key.write_text("secret\n")
    text = (PROMETHEUS / "prometheus.yml").read_text()
    assert text.count("/etc/prometheus/metrics_key") == 1
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/metrics_key", str(key)))
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    checked = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert checked.returncode == 0, checked.stderr
    assert f"{len(ALERTS)} rules found" in checked.stdout


def test_prometheus_sends_a_key_where_one_is_asked_for():
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert "metrics_path" not in job  # so that it is /metrics
    assert "/metrics" in {each.path for each in ENDPOINTS} - OPEN_PATHS
    assert job["authorization"].keys() == {"credentials_file"}  # sent as `Bearer`
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{ServerSettings().port}"]


def test_alerts_come_when_they_should():
    checked = promtool("test", "rules", str(PROMETHEUS / "alerts_test.yml"))
    assert checked.returncode == 0, checked.stderr + checked.stdout


def test_every_alert_is_tested_to_come_and_to_stay_away():
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    tests = [case for each in cases for case in each["alert_rule_test"]]
    names = {alert["alert"] for alert in ALERTS}
    assert {case["alertname"] for case in tests if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in tests if not case.get("exp_alerts")} == names


def test_alerts_ask_for_the_job_that_prometheus_knows():
    service = yaml.safe_load((MANIFESTS / "base" / "service.yaml").read_text())["metadata"]["name"]
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    asked = {each for alert in ALERTS for each in re.findall(r'job="([^"]*)"', alert["expr"])}
    # the Prometheus Operator gives a target its Service's name as job
    assert asked == {job["job_name"]} == {service}


def test_the_alert_for_a_long_queue_comes_before_it_is_full():
    (alert,) = [each for each in ALERTS if each["alert"] == "ModelServerQueueLong"]
    limit = int(alert["expr"].rpartition(">")[2])
    assert limit == ServerSettings().max_queued * 3 // 4
