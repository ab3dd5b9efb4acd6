"""The unit as it is shipped, run by a real systemd: a server of a compiled model under all of its restrictions."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from export.stage import ROOT
from tests.helpers.nested_systemd import systemd
from tests.helpers.scripted_process import free_port
from tests.helpers.serving import Running, until

KEY = {"Authorization": "Bearer secret"}
SERVICE = "mistral-server@tiny.service"
# the Python of the tests may lie in a home folder, which the service does not see
MOUNTS = """
mkdir -p /opt/serving/tiny /opt/python /opt/packages /etc/serving
mount --bind {box} /opt/serving/tiny
mount --bind {python} /opt/python
mount --bind {packages} /opt/packages
cp {box}/etc/* /etc/serving
cp {unit} /etc/systemd/system
mkdir /etc/systemd/system/{service}.d
cat > /etc/systemd/system/{service}.d/faster.conf <<END
[Service]
WatchdogSec=2
RestartSec=100ms
StandardError=file:/run/server.log
END
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root starts a systemd of its own")


@pytest.fixture(scope="module")
def box(compile_case, tmp_path_factory):
    """A folder such as a shipped file unpacks to, with its settings in etc/; returns it and the server's port."""
    folder, port = tmp_path_factory.mktemp("box"), free_port()
    shutil.copytree(compile_case("int8").artifact, folder / "artifact")
    shutil.copytree(ROOT / "runtime", folder / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (folder / ".venv" / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
    (programs / "python").symlink_to(f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    etc = folder / "etc"
    etc.mkdir()
    text = (ROOT / "deploy" / "systemd" / "server.toml").read_text()
    text = re.sub(r"^port = \d+", f"port = {port}", text, flags=re.MULTILINE)
    (etc / "tiny.toml").write_text(re.sub(r"^unready_seconds = \d+", "unready_seconds = 0", text, flags=re.MULTILINE))
    (etc / "tiny.env").write_text("LD_LIBRARY_PATH=/opt/python/lib\nPYTHONPATH=/opt/packages\n")
    (etc / "keys").write_text("secret\n")
    (etc / "keys").chmod(0o600)
    folder.chmod(0o755)
    return folder, port


@pytest.fixture(scope="module")
def manager(box, tmp_path_factory):
    mounts = MOUNTS.format(
        box=box[0],
        python=sys.base_prefix,
        packages=Path(msgspec.__file__).parents[1],
        unit=ROOT / "deploy" / "systemd" / "mistral-server@.service",
        service=SERVICE,
    )
    with systemd(mounts, tmp_path_factory.mktemp("log") / "systemd.log") as found:
        yield found


@pytest.fixture(scope="module")
def server(manager, box):
    """The server, which `systemctl start` has said to be ready."""
    manager.run("systemctl", "start", SERVICE, check=False)
    said = manager.run("cat", "/run/server.log", check=False)
    assert manager.show(SERVICE, "ActiveState") == "active", said
    return Running(None, box[1])


def main_process(manager):
    """The numbers of the server's process: in the namespace of systemd."""
    return manager.show(SERVICE, "MainPID")


def test_it_answers_who_has_a_key_as_soon_as_it_has_started(server):
    assert server.ask("/ready").status == 200
    assert server.ask("/v1/models").status == 401
    name = server.ask("/v1/models", headers=KEY).json["data"][0]["id"]
    asked = {"model": name, "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
    answer = server.ask("/v1/completions", asked, headers=KEY)
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 4


def test_it_has_no_rights(server, manager):
    status = dict(
        line.split(":\t", 1) for line in manager.run("cat", f"/proc/{main_process(manager)}/status").splitlines()
    )
    assert "0" not in status["Uid"].split()
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # a filter


def test_it_sees_no_file_that_it_could_write(server, manager):
    """As root in the mount namespace of the service, which file systems that are read-only stop as well."""

    def inside(*command):
        done = ["nsenter", "-t", main_process(manager), "-m", "--", *command]
        return subprocess.run(
            ["nsenter", "-t", str(manager.pid), "-m", "-p", "--", *done], capture_output=True, text=True, check=False
        )

    for folder in ("/opt/serving/tiny", "/etc", "/usr", "/var"):
        assert "Read-only file system" in inside("touch", f"{folder}/written").stderr, folder
    assert inside("touch", "/tmp/written").returncode == 0
    assert inside("ls", "-A", "/root", "/home").stdout.split() == ["/home:", "/root:"]


def test_a_server_that_hangs_is_started_again(server, manager):
    before = main_process(manager)
    manager.run("kill", "-STOP", before)
    until(lambda: main_process(manager) not in (before, "0") and manager.show(SERVICE, "ActiveState") == "active")
    assert manager.show(SERVICE, "NRestarts") == "1"
    assert server.ask("/ready").status == 200


def test_it_ends_gently(server, manager):
    manager.run("systemctl", "stop", SERVICE)
    shown = {name: manager.show(SERVICE, name) for name in ("Result", "ExecMainStatus", "ActiveState")}
    assert shown == {"Result": "success", "ExecMainStatus": "0", "ActiveState": "inactive"}
