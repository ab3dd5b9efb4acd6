"""What goes wrong in a cluster, and what clients see of it."""

import os
import signal
import socket
import threading
import time
from functools import partial
from itertools import product
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from cluster.bench.paced_model import open_paced
from cluster.local import replicas
from runtime.errors import UserError
from runtime.server.http.gate import CLIENT_LEFT
from tests.helpers.cluster import MODEL, PACE, SLOW, chat, completion, port_of
from tests.helpers.serving import Running, until


def requests_of(address):
    return sum(each.requests for each in replicas(address, MODEL))


def leave(address, body, seconds, name):
    """Ask, and close the connection after so many seconds."""
    data = msgspec.json.encode(body)
    own = f"Host: x\r\nX-Request-ID: {name}\r\nContent-Length: {len(data)}"
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n{own}"
    with socket.create_connection(("127.0.0.1", port_of(address))) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + data)
        time.sleep(seconds)


def test_a_replica_that_hangs_hides_no_other(deploy, address):
    client = deploy({MODEL: PACE}, num_replicas=2)
    hanging, well = replicas(address, MODEL)
    os.kill(hanging.process, signal.SIGSTOP)
    try:
        assert [each.replica for each in replicas(address, MODEL)] == [well.replica]
        assert client.ask("/ready").status == 200
        assert f'replica="{well.replica}"' in client.ask("/metrics").body.decode()
    finally:
        os.kill(hanging.process, signal.SIGCONT)


def test_replicas_that_are_full_are_still_there(deploy, address):
    client = deploy({MODEL: SLOW}, max_ongoing_requests=1)
    asking = threading.Thread(target=client.ask, args=("/v1/completions", completion(30)))
    asking.start()
    until(lambda: requests_of(address) == 1)
    assert client.ask("/ready").status == 200
    assert "vllm:num_requests_running" in client.ask("/metrics").body.decode()
    assert requests_of(address) == 1
    asking.join()


def test_an_answer_has_one_request_id(deploy):
    client = deploy({MODEL: PACE})
    for given, path in product(({}, {"X-Request-ID": "mine-1"}), ("/v1/models", "/nowhere")):
        connection = client.connect()
        connection.request("GET", path, headers=given)
        ids = connection.getresponse().headers.get_all("x-request-id")
        connection.close()
        assert len(ids) == 1
        assert not given or ids == ["mine-1"]


def test_a_client_that_leaves_ends_its_request_wherever_it_is(deploy, address):
    client = deploy({MODEL: SLOW}, max_ongoing_requests=1)
    names = [f"left-{uuid4()}" for _ in range(2)]
    leave(address, completion(500), 0.5, names[0])  # while it is answered
    left = time.monotonic()
    until(lambda: requests_of(address) == 0)
    assert time.monotonic() - left < 5  # the answer would have taken 50 s
    first = threading.Thread(target=client.ask, args=("/v1/completions", completion(10)))
    first.start()
    until(lambda: requests_of(address) == 1)
    leave(address, completion(10), 0.2, names[1])  # while it waits in the front
    first.join()
    assert chat(client).status == 200  # which has gone after it, if it has gone
    done = [line for line in client.ask("/metrics").body.decode().splitlines() if "request_success_total{" in line]
    assert sum(float(line.rpartition(" ")[2]) for line in done) == 3  # the first of all, `first`, and the last
    assert {line["status"] for name in names for line in logged(name)} == {CLIENT_LEFT}


def logged(name):
    """The log lines of a request, on all nodes."""
    files = [file for file in Path("/tmp/ray").glob("session_2*/logs/worker-*.err") if name in file.read_text()]
    lines = [line for file in files for line in file.read_text().splitlines() if line.startswith("{") and name in line]
    return [msgspec.json.decode(line) for line in lines]


def test_a_request_that_took_too_long_is_ended_in_its_replica(deploy, address):
    client = deploy({MODEL: SLOW}, max_ongoing_requests=1, settings={"request_seconds": 3.0})
    first = threading.Thread(target=client.ask, args=("/v1/completions", completion(25)))
    first.start()
    until(lambda: requests_of(address) == 1)
    late = client.ask("/v1/completions", completion(100))
    assert (late.status, late.error["code"], late.headers["retry-after"]) == (503, "timeout", "2")
    told = time.monotonic()
    until(lambda: requests_of(address) == 0)
    assert time.monotonic() - told < 1  # by its own limit, it would have gone on for a second and a half
    first.join()


def open_broken():
    raise UserError("/srv/models/demo is broken, expected it whole; copy it again")


def test_a_model_that_cannot_be_opened_is_told_of(deploy_opened, address):
    with pytest.raises(UserError, match=r"/srv/models/demo is broken, expected it whole; copy it again$"):
        deploy_opened({MODEL: open_broken})
    refused = chat(Running(None, port_of(address)))
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "model_unavailable", "30")
    assert "/srv" not in refused.error["message"]


def open_slowly_again(opened_before, artifact):
    if opened_before.exists():
        time.sleep(6)
    opened_before.touch()
    return open_paced(artifact, SLOW)


def test_without_a_replica_requests_wait_their_time_and_no_longer(deploy_opened, address, artifact, tmp_path):
    opener = partial(open_slowly_again, Path(tmp_path) / "opened", artifact)
    client = deploy_opened({MODEL: opener}, max_ongoing_requests=1, settings={"request_seconds": 2.0})
    answers = []
    asking = [threading.Thread(target=lambda: answers.append(chat(client, max_tokens=15))) for _ in range(3)]
    for each in asking:
        each.start()
    until(lambda: requests_of(address) == 1)
    (replica,) = replicas(address, MODEL)
    asked = time.monotonic()
    os.kill(replica.process, signal.SIGKILL)
    for each in asking:
        each.join()
    assert time.monotonic() - asked < 5
    assert sorted(answer.error["code"] for answer in answers) == ["replica_lost", "timeout", "timeout"]
    assert all((answer.status, answer.headers["retry-after"] in "12") == (503, True) for answer in answers)
    assert client.ask("/ready").status == 503
