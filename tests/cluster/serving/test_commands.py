"""The commands of a cluster as people use them, with a real artifact."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import yaml

from cluster.local import free_port, local_cluster
from export.stage import ROOT
from runtime.server.running.served_model import open_served_model
from tests.helpers.serving import Running, events_of, running

SECONDS = 60.0  # within which Ray surely has an application running


def test_serve_deploy_takes_the_shipped_file(artifact, tmp_path):
    """The answers are those of one box."""
    port, dashboard = free_port(), free_port()
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    config["http_options"].update(host="127.0.0.1", port=port)
    (app,) = config["applications"]
    app["args"] = {"models": {"demo": {"artifact": str(artifact)}}, "allow_no_keys": True}
    app["deployments"][1]["ray_actor_options"] = {"num_cpus": 1}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("serve"), "deploy", file, "--address", f"http://127.0.0.1:{dashboard}"]
    with local_cluster(nodes=1, cpus=2, dashboard_port=dashboard):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        client = Running(None, port)
        _wait_until_ready(client)
        body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        with running(partial(open_served_model, artifact, 1, 0), name="demo") as box:
            alone = box.ask("/v1/completions", body).json["choices"]
        assert client.ask("/v1/completions", body).json["choices"] == alone
        pieces = events_of(client.ask("/v1/completions", {**body, "stream": True}).body)
        assert "".join(each["choices"][0]["text"] for each in pieces[:-1]) == alone[0]["text"]


def _wait_until_ready(client):
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if client.ask("/ready").status == 200:
                return
        except (OSError, ValueError):  # Ray's proxy has not started, or knows no application yet
            pass
        assert time.monotonic() < deadline, "the application does not run"
        time.sleep(0.2)


def test_the_demo_asks_a_replica_on_each_node(artifact):
    """In a cluster of its own."""
    command = [sys.executable, "-m", "cluster.demo", "--once", str(artifact)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "node 127.0.0.2" in done.stdout
    assert "node 127.0.0.3" in done.stdout
    assert "raylet" not in done.stdout
    assert done.stderr == "starting two nodes ...\n"
