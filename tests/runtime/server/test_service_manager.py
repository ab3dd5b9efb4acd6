"""What systemd is told (sd_notify(3)), as it arrives at a socket such as systemd's.

That systemd itself acts upon it is tested in tests/deploy/systemd.
"""

import asyncio
import os
import socket
from contextlib import contextmanager

import pytest

from runtime.server.service_manager import READY, ServiceManager


@contextmanager
def listening(address):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:
        receiving.bind(address)
        receiving.settimeout(5)
        yield receiving


@pytest.mark.parametrize("abstract", [True, False])
def test_a_state_arrives(tmp_path, abstract):
    name = f"@manager-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with listening("\0" + name[1:] if abstract else name) as manager:
        ServiceManager({"NOTIFY_SOCKET": name}).tell(READY)
        assert manager.recv(100) == b"READY=1"


def test_a_manager_that_is_gone_is_no_reason_to_fail(tmp_path):
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell(READY)
    ServiceManager({}).tell(READY)


def told_within(seconds, environment, healthy=lambda: True):
    """What arrives while the server says for some seconds that it lives."""
    name = f"@alive-{os.getpid()}"
    with listening("\0" + name[1:]) as manager:
        manager.setblocking(False)
        living = ServiceManager({"NOTIFY_SOCKET": name, **environment}).tell_while(healthy)

        async def run():
            try:
                await asyncio.wait_for(living, seconds)
            except TimeoutError:
                return

        asyncio.run(run())
        found = []
        while True:
            try:
                found.append(manager.recv(100))
            except BlockingIOError:
                return found


def test_signs_of_life_come_more_often_than_they_are_waited_for():
    # 0.3 s may pass between two: within 0.7 s at least three must have come, the first at once
    assert len(told_within(0.7, {"WATCHDOG_USEC": "300000", "WATCHDOG_PID": str(os.getpid())})) >= 3
    assert set(told_within(0.05, {"WATCHDOG_USEC": "30000"})) == {b"WATCHDOG=1"}


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "30000", "WATCHDOG_PID": "1"}],
)
def test_nothing_is_told_where_nobody_waits(environment):
    assert told_within(0.1, environment) == []


def test_a_server_whose_engine_has_failed_gives_no_sign_of_life():
    assert told_within(0.1, {"WATCHDOG_USEC": "30000"}, lambda: False) == []
