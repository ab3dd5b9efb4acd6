"""The gateway's configuration as haproxy reads it: as shipped, without root, and with its commented parts."""

import os
import ssl
import subprocess
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from runtime.server.process import KEEP_ALIVE_SECONDS
from runtime.server.settings import ServerSettings
from tests.helpers.gateway import CONFIGURATION, check, environment, gateway
from tests.helpers.scripted_process import free_port
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import running

NOBODY = 65534  # a user without rights, of every Debian
TEXT = CONFIGURATION.read_text()


def with_comment(text, start):
    """The text with a line that is commented out put to use."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f"# {start}")]
    return text.replace(line, line.replace("# ", "", 1))


def value_of(name):
    """The seconds of a time-out."""
    (line,) = [line for line in TEXT.splitlines() if line.strip().startswith(f"{name} ")]
    return int(line.split("#")[0].strip().removeprefix(name).strip().removesuffix("s"))


def test_the_configuration_is_valid_without_warnings():
    found = check(CONFIGURATION, environment(1, 2, 3, 4))
    assert (found.returncode, found.stderr) == (0, "")


def test_a_server_without_an_address_is_refused():
    given = environment(1, 2, 3, 4)
    del given["SERVER_2"]
    assert check(CONFIGURATION, given).returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_it_starts_without_root():
    given = {**environment(1, 2, free_port(), free_port()), "WITHOUT_ROOT": "1"}
    with TemporaryDirectory() as folder:  # everyone may read it, unlike pytest's own
        Path(folder).chmod(0o755)
        copy = Path(folder) / "haproxy.cfg"
        copy.write_text(TEXT)
        with subprocess.Popen(
            ["haproxy", "-db", "-f", str(copy)],
            env=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            user=NOBODY,
            group=NOBODY,
        ) as process:
            told = next((line for line in process.stdout if "Server least_busy/first is DOWN" in line), "")
            process.kill()
    assert told  # it has begun to ask the servers


def test_root_is_given_up(tmp_path):
    with running(scripted()) as server, gateway(server.port, server.port, tmp_path / "log") as front:
        assert Path(f"/proc/{front.process.pid}").owner() != "root"


def test_a_third_server_and_https_need_only_their_lines(tmp_path):
    pem = tmp_path / "gateway.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    subprocess.run([*command, "-keyout", str(tmp_path / "key"), "-out", str(pem)], check=True, capture_output=True)
    certificate = pem.read_text()
    pem.write_text(certificate + (tmp_path / "key").read_text())
    text = TEXT.replace('    bind "${GATEWAY_ADDRESS-0.0.0.0:8080}"\n', "")
    text = with_comment(text, 'bind "${GATEWAY_ADDRESS-0.0.0.0:8443}"').replace("/etc/haproxy/gateway.pem", str(pem))
    for start in ("server third 10.0.0.13:8000 track", "server third 10.0.0.13:8000"):
        text = with_comment(text, start)
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(text)
    with (
        running(scripted()) as server,
        gateway(server.port, server.port, tmp_path / "log", configuration=configuration) as front,
        urllib.request.urlopen(
            f"https://127.0.0.1:{front.port}/ready", context=ssl.create_default_context(cadata=certificate)
        ) as answer,
    ):
        assert answer.status == 200


def test_the_time_outs_fit_the_servers():
    defaults = ServerSettings()
    assert value_of("timeout server") > defaults.request_seconds
    assert value_of("hard-stop-after") > value_of("timeout server")
    assert value_of("timeout client") > defaults.ping_seconds
    assert value_of("timeout http-keep-alive") < KEEP_ALIVE_SECONDS
    assert f"gt {defaults.max_body_bytes} " in TEXT
