"""The gateway of deploy/gateway: a real haproxy with the file as it is shipped."""

import csv
import io
import os
import subprocess
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.scripted_process import free_port
from tests.helpers.serving import Running, until

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "gateway" / "haproxy.cfg"
ANSWER_SECONDS = 20
SERVERS = ("first", "second")


def environment(server_1, server_2, gateway, statistics):
    """The environment of haproxy; servers, gateway and statistics are ports of this machine."""
    ports = {"SERVER_1": server_1, "SERVER_2": server_2, "GATEWAY_ADDRESS": gateway, "STATISTICS_ADDRESS": statistics}
    rootless = {} if os.geteuid() == 0 else {"WITHOUT_ROOT": "1"}
    return {**os.environ, **{name: f"127.0.0.1:{port}" for name, port in ports.items()}, **rootless}


def check(configuration, given):
    """What `haproxy -c` says of a configuration."""
    return subprocess.run(
        ["haproxy", "-c", "-f", str(configuration)], env=given, capture_output=True, text=True, check=False
    )


@dataclass
class Gateway(Running):
    """A gateway, which is asked as a server is."""

    statistics: int = 0
    process: subprocess.Popen | None = None

    def states(self, backend="least_busy"):
        """UP or DOWN of each server, as the gateway sees it."""
        return {name: row["status"].split()[0] for name, row in self.rows(backend).items()}

    def counts(self, backend="least_busy"):
        """How many requests each server has got."""
        return {name: int(row["stot"]) for name, row in self.rows(backend).items()}

    def wait_for(self, **states):
        """Wait until the gateway sees these servers so."""
        until(lambda: {**self.states(), **states} == self.states())

    def rows(self, backend):
        """What the gateway says of each server, by the names of its columns."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.statistics}/;csv", timeout=ANSWER_SECONDS) as response:
            table = csv.DictReader(io.StringIO(response.read().decode().removeprefix("# ")))
        return {row["svname"]: row for row in table if row["pxname"] == backend and row["svname"] in SERVERS}


@contextmanager
def gateway(server_1, server_2, log, *, states=("UP", "UP"), configuration=CONFIGURATION):
    """A gateway in front of two ports, once it sees the two servers so; its log is written into a file."""
    port, statistics = free_port(), free_port()
    given = environment(server_1, server_2, port, statistics)
    with log.open("wb") as written:
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(configuration)], env=given, stdout=written, stderr=subprocess.STDOUT
        )
    try:
        running = Gateway(None, port, statistics=statistics, process=process)
        until(lambda: process.poll() is not None or _asked(running))
        assert process.poll() is None, log.read_text()
        running.wait_for(**dict(zip(SERVERS, states, strict=True)))
        yield running
    finally:
        process.kill()
        process.wait()


def _asked(running):
    """Whether the gateway runs and has asked every server for its state; before, all count as ready."""
    try:
        rows = running.rows("least_busy")
    except OSError:
        return False
    return all(row["check_status"] not in ("", "INI") for row in rows.values())
