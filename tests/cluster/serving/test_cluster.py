"""Ray Serve on two nodes of this machine, with models that take a fixed time and compute nothing."""

import asyncio
import json
import os
import signal
import time
from functools import partial

from cluster.bench.affinity import measure_affinity
from cluster.bench.client import ask, ask_all, chat_body
from cluster.bench.losses import conversations, kill_one, measure
from cluster.bench.paced_model import open_paced
from cluster.local import replicas
from tests.helpers.cluster import MODEL, PACE, SECONDS, SLOW, chat, port_of
from tests.helpers.serving import running, until


def test_each_model_is_asked_by_its_name_and_answers_as_one_box_does(deploy, artifact):
    client = deploy({MODEL: PACE, "other": PACE})
    with running(partial(open_paced, artifact, PACE), name=MODEL) as box:
        alone = chat(box).json
    found = chat(client)
    assert found.json["choices"] == alone["choices"]
    assert found.json["usage"] == alone["usage"]
    assert found.headers["x-request-id"]
    assert chat(client, model="other").json["model"] == "other"
    assert [card["id"] for card in client.ask("/v1/models").json["data"]] == [MODEL, "other"]
    assert client.ask("/v1/models/other").json["id"] == "other"
    for wrong in (chat(client, model="third"), client.ask("/v1/models/third")):
        assert (wrong.status, wrong.error["code"]) == (404, "model_not_found")
        assert "expected one of paced, other" in wrong.error["message"]
    missing = client.ask("/v1/chat/completions", {"messages": []})
    assert (missing.status, missing.error["param"]) == (400, "model")


def test_what_is_wrong_is_refused_as_one_box_does(deploy):
    client = deploy({MODEL: PACE}, settings={"max_body_bytes": 2000})
    unknown = client.ask(
        "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "colour": "red"}
    )
    assert (unknown.status, unknown.error["param"]) == (400, "colour")
    assert client.ask("/v1/chat/completions", b"{").error["code"] == "invalid_json"
    assert chat(client, "x" * 3000).status == 413
    assert client.ask("/nowhere").status == 404
    assert client.ask("/v1/chat/completions").headers["allow"] == "POST"
    anthropic = client.ask("/v1/messages", {"model": MODEL, "messages": [{"role": "user", "content": "x"}]})
    assert anthropic.json["type"] == "error"  # max_tokens is missing


def test_what_replicas_do_is_told_in_one_place(deploy):
    client = deploy({MODEL: PACE}, num_replicas=2)
    assert client.ask("/ready").status == client.ask("/health").status == client.ask("/").status == 200
    for number in range(6):
        chat(client, f"Question {number}")
    metrics = client.ask("/metrics").body.decode().splitlines()
    lines = [line for line in metrics if line.startswith("vllm:generation_tokens_total{")]
    assert len(lines) == 2  # one for each replica
    assert sum(float(line.rpartition(" ")[2]) for line in lines) == 6 * 4
    (model,) = client.ask("/replicas").json
    assert len({each["replica"] for each in model["replicas"]}) == 2
    assert all(each["slots"] == PACE.slots for each in model["replicas"])
    assert [slot["id"] for slot in client.ask("/slots").json["slots"]] == list(range(2 * PACE.slots))


def test_keys_and_hosts_are_checked_in_front(deploy, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    client = deploy({MODEL: PACE}, settings={"keys_file": str(keys), "allow_no_keys": False, "allowed_hosts": ["api"]})
    assert chat(client).status == 421
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert client.ask("/v1/chat/completions", body, headers={"Host": "api"}).status == 401
    asked = {"Host": "api", "Authorization": "Bearer secret"}
    assert client.ask("/v1/chat/completions", body, headers=asked).status == 200


def test_tokens_come_one_by_one(deploy):
    client = deploy({MODEL: SLOW})
    connection = client.connect()
    body = json.dumps({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 8, "stream": True, "ignore_eos": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    arrivals = []
    while line := response.readline():
        if line.startswith(b"data: {"):
            arrivals.append(time.monotonic())
    # Eight steps of 0.1 s each; were they collected, the first would come with the last. Half of that is asked for.
    assert arrivals[-1] - arrivals[0] > 0.35


def test_a_client_that_leaves_ends_its_request(deploy, address):
    client = deploy({MODEL: SLOW})
    connection = client.connect()
    body = json.dumps({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 500, "stream": True, "ignore_eos": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    assert replicas(address, MODEL)[0].requests == 1
    response.close()
    connection.close()
    left = time.monotonic()
    until(lambda: replicas(address, MODEL)[0].requests == 0)
    assert time.monotonic() - left < 5  # the answer would have taken 50 s


def test_a_full_cluster_says_when_to_come_back(deploy, address):
    deploy({MODEL: SLOW}, max_ongoing_requests=1, max_queued_requests=2)
    bodies = conversations(MODEL, 8, 8)
    outcomes = asyncio.run(ask_all(port_of(address), 8, bodies))
    refused = [outcome for outcome in outcomes if outcome.kind == "refused"]
    assert {outcome.kind for outcome in outcomes} == {"complete", "refused"}
    assert {(outcome.status, outcome.code) for outcome in refused} == {(429, "queue_full")}
    assert {outcome.retry_after for outcome in refused} == {"2"}


async def _one_after_another(port, bodies):
    """Answers to requests that begin a moment apart, so that each is counted before the next one is routed."""
    asking = []
    for body in bodies:
        asking.append(asyncio.ensure_future(ask(port, body)))
        await asyncio.sleep(0.1)
    return await asyncio.gather(*asking)


def test_conversations_stay_where_they_are_but_give_way(deploy, address):
    deploy({MODEL: PACE}, num_replicas=2)
    found = measure_affinity(port_of(address), MODEL, clients=1, turns=8, tokens=4)
    assert (found.hits, found.turns) == (7, 7)
    assert found.cached_tokens > 0
    outcomes = asyncio.run(_one_after_another(port_of(address), conversations(MODEL, 1, 60) * 8))
    assert {outcome.kind for outcome in outcomes} == {"complete"}
    assert len({outcome.replica for outcome in outcomes}) == 2


def test_a_killed_replica_loses_what_it_was_answering_and_no_more(deploy, address):
    deploy({MODEL: PACE}, num_replicas=2)
    change = partial(kill_one, address, MODEL)
    clients = 6
    found = measure("killed", address, MODEL, change, count=60, clients=clients, tokens=12)
    assert set(found.kinds) <= {"complete", "error event", "refused"}
    # Each client had one request on its way when it happened; any that came later and was lost would be one more.
    assert 0 < found.lost <= clients
    assert found.wrong_texts == 0
    until(lambda: len(replicas(address, MODEL)) == 2)


def test_a_rolling_update_loses_nothing(deploy, address):
    deploy({MODEL: PACE}, num_replicas=2)
    old = {each.replica for each in replicas(address, MODEL)}

    def change():
        deploy({MODEL: PACE}, num_replicas=2, settings={"request_seconds": 599.0})
        return 0

    found = measure("updated", address, MODEL, change, count=60, clients=6, tokens=12)
    assert found.kinds == {"complete": 60}
    assert found.wrong_texts == 0
    assert not old & {each.replica for each in replicas(address, MODEL)}


def test_replicas_come_and_go_with_the_load_and_nothing_is_lost(deploy, address):
    policy = {"policy_function": "cluster.serving.scaling:by_slots"}
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 1, "look_back_period_s": 1, "metrics_interval_s": 0.5}
    scaling = {"min_replicas": 1, "max_replicas": 2, "policy": policy, **delays}
    deploy({MODEL: PACE}, num_replicas=None, autoscaling_config=scaling)
    port, counts = port_of(address), set()
    up = asyncio.run(ask_all(port, 6, conversations(MODEL, 60, 30)))
    counts.add(len(replicas(address, MODEL)))
    deadline = time.monotonic() + SECONDS
    down = []
    while 1 not in counts and time.monotonic() < deadline:  # one client alone, while a replica ends
        down.append(asyncio.run(ask(port, chat_body(MODEL, [{"role": "user", "content": f"{len(down)}"}], 20))))
        counts.add(len(replicas(address, MODEL)))
    assert counts == {1, 2}
    assert {outcome.kind for outcome in up + down} == {"complete"}


def test_a_replica_whose_engine_hangs_is_replaced(deploy, address):
    deploy({MODEL: PACE}, health_check_period_s=0.5, health_check_timeout_s=2)
    (before,) = replicas(address, MODEL)
    os.kill(before.process, signal.SIGSTOP)
    try:
        until(lambda: before.replica not in {each.replica for each in replicas(address, MODEL)} != set())
    finally:
        os.kill(before.process, signal.SIGKILL)
