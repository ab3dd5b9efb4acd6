"""The Dockerfile as a linter sees it, and compose.yaml beside the Dockerfile and the server's settings.

docker itself is not needed: `test_image.py` builds and runs the Dockerfile by other tools.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runtime.serve import _parser
from runtime.server.process import CLOSING_SECONDS
from runtime.server.settings import ServerSettings
from tests.helpers.container import DOCKERFILE, NO_NETWORK

COMPOSE = yaml.safe_load((DOCKERFILE.parent / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
# the Dockerfile's instructions, each on one line and without comments
INSTRUCTIONS = [
    line
    for line in re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)).splitlines()
    if line
]


def instruction(name):
    """The arguments of the only instruction of that name."""
    (found,) = [line.removeprefix(f"{name} ") for line in INSTRUCTIONS if line.startswith(f"{name} ")]
    return found


def exec_form(text):
    """The list in JSON's form that ends an instruction."""
    return yaml.safe_load(text[text.index("[") :])


def with_defaults(value):
    """The value with the defaults of compose's variables, as in `${PORT:-8000}`."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def seconds(text):
    """Seconds of one of compose's times."""
    return int(re.fullmatch(r"(\d+)s", text)[1])


def test_the_linter_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert hadolint is not None, "there is no hadolint; install requirements/deploy_checks.lock"
    command = [hadolint, "--no-color", "--failure-threshold", "style"]
    found = subprocess.run([*command, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    assert "hadolint ignore" not in DOCKERFILE.read_text()
    bad = DOCKERFILE.read_text().replace("USER 10001:10001", "USER root")  # the linter does find what is wrong
    found = subprocess.run([*command, "-"], input=bad, capture_output=True, text=True, check=False)
    assert (found.returncode, "DL3002" in found.stdout) == (1, True)


def test_no_step_has_a_network_and_nothing_is_fetched():
    steps = [line for line in INSTRUCTIONS if line.startswith("RUN ")]
    assert steps
    assert all(line.startswith(NO_NETWORK) for line in steps)
    assert not [line for line in INSTRUCTIONS if line.startswith("ADD ")]
    assert {line.split()[1] for line in INSTRUCTIONS if line.startswith("FROM ")} == {"${BASE}"}


def test_compose_names_nothing_that_is_missing():
    assert {service: of["profiles"] for service, of in SERVICES.items()} == {"server": ["cpu"], "server-cuda": ["cuda"]}
    for service in SERVICES.values():
        assert set(service["secrets"]) == set(COMPOSE["secrets"])
        (port,) = service["ports"]
        assert with_defaults(port) == f"127.0.0.1:8000:{instruction('EXPOSE')}"


@pytest.mark.parametrize("arguments", [exec_form(instruction("CMD")), *(of["command"] for of in SERVICES.values())])
def test_the_arguments_are_those_of_the_server(arguments):
    """Others reach it, with keys from the secret, at the port that is exposed."""
    given = _parser().parse_args(["artifact", *map(with_defaults, arguments)])
    assert (given.host, given.allow_no_keys) == ("0.0.0.0", False)
    assert given.keys_file == f"/run/secrets/{next(iter(COMPOSE['secrets']))}"
    assert int(instruction("EXPOSE")) == given.port or given.port is None
    assert ServerSettings().port == int(instruction("EXPOSE"))


def test_the_health_check_is_the_same_in_both():
    options, command = instruction("HEALTHCHECK").split(" CMD ")
    flags = dict(option.removeprefix("--").split("=") for option in shlex.split(options))
    expected = {
        "test": ["CMD", *exec_form(command)],
        **{name.replace("-", "_"): int(value) if value.isdigit() else value for name, value in flags.items()},
    }
    assert all(service["healthcheck"] == expected for service in SERVICES.values())


def test_docker_waits_until_the_server_has_drained():
    defaults = ServerSettings()
    least = defaults.unready_seconds + defaults.drain_seconds + CLOSING_SECONDS
    assert all(seconds(service["stop_grace_period"]) > least for service in SERVICES.values())


def test_a_container_may_do_as_little_as_it_needs():
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network_mode", "volumes", "user", "pid"} & service.keys()
        limits = service["deploy"]["resources"]["limits"]
        assert limits.keys() == {"cpus", "memory", "pids"}
        assert service["command"][-1] == limits["cpus"]  # as many threads as cores


def test_the_gpu_is_reserved_for_cuda_alone():
    assert "reservations" not in SERVICES["server"]["deploy"]["resources"]
    (device,) = SERVICES["server-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
