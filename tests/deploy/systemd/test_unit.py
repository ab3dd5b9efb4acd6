"""deploy/systemd: what systemd's own tools say of the unit, and whether its times fit the server's."""

import json
import re
import shutil
import subprocess

import pytest

from export.stage import ROOT
from runtime.server.process import CLOSING_SECONDS
from runtime.server.service import END_SECONDS
from runtime.server.settings import read_settings

FOLDER = ROOT / "deploy" / "systemd"
UNIT = "mistral-server@.service"
TEXT = (FOLDER / UNIT).read_text()
# `systemd-analyze security` counts from 0, nothing is open, to 10; systemd 252 finds 1.4 and 2.1
EXPOSURE = {"cpu": 1.5, "cuda": 2.1}
OPEN = {
    "PrivateNetwork",  # the server listens
    "RestrictAddressFamilies_AF_INET_INET6",
    "RestrictAddressFamilies_AF_UNIX",  # it tells systemd how it is
    "IPAddressDeny",  # who may reach it differs from site to site
    "RootDirectoryOrRootImage",
    "SystemCallFilter_resources",
    "ProcSubset",
    "PrivateMounts",
    "DeviceAllow",
}


def setting(name, text=TEXT):
    """The last value of a setting of the unit."""
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)[-1]


def analyze(*arguments):
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=30)


@pytest.fixture(params=["cpu", "cuda"])
def variant(request):
    return request.param


@pytest.fixture
def unit(variant, tmp_path):
    """The unit, or that with its drop-in, with a program that exists where a box has the server's Python."""
    written = tmp_path / UNIT
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    written.write_text(TEXT.replace("/opt/serving/%i/.venv/bin/python", str(program)))
    if variant == "cuda":
        drop_ins = tmp_path / f"{UNIT}.d"
        drop_ins.mkdir()
        shutil.copy(FOLDER / "cuda.conf", drop_ins)
    return str(written)


def test_systemd_finds_no_fault(unit):
    checked = analyze("verify", "--man=no", unit)
    assert checked.returncode == 0
    assert not checked.stderr  # where it tells of settings that it does not know, without failing


def test_systemd_finds_a_fault(unit, tmp_path):
    wrong = tmp_path / "wrong.service"
    wrong.write_text(TEXT.replace("ProtectHome=yes", "ProtectHomes=yes"))
    assert "ProtectHomes" in analyze("verify", "--man=no", str(wrong)).stderr


def test_little_is_open(variant, unit):
    threshold = round(10 * EXPOSURE[variant])
    checked = analyze("security", "--offline=yes", f"--threshold={threshold}", "--json=short", unit)
    assert checked.returncode == 0, checked.stdout
    found = {each["json_field"] for each in json.loads(checked.stdout) if each["set"] is False}
    if variant == "cpu":
        assert found <= OPEN


def test_the_service_has_the_time_to_end_gently():
    settings = read_settings(FOLDER / "server.toml", {})
    time = float(setting("TimeoutStopSec"))
    assert time > settings.unready_seconds + settings.drain_seconds + END_SECONDS + CLOSING_SECONDS


def test_ports_of_the_settings_may_be_bound():
    low, high = map(int, setting("SocketBindAllow").removeprefix("tcp:").split("-"))
    assert low <= read_settings(FOLDER / "server.toml", {}).port <= high
