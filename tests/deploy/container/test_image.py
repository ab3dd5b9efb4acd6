"""An image of a tiny shipped file is built by the Dockerfile's own steps, and its server answers in a container.

The base image is made of this machine's Python, as no image can be pulled. The container has what compose.yaml asks
for: a root that can only be read, no capability, and a user who is not root.
"""

import json
import os
import shutil

import pytest

from build.shipping import ship
from build.shipping.archive import with_sums, write_archive
from build.shipping.keys import make_keys
from build.shipping.wheels import fetch_wheels
from runtime.artifact.folder import Artifact
from tests.helpers.container import Buildah, container
from tests.helpers.shipped import PYTHON, unpack

KEY = "one-key"
LONG = 4000  # tokens, so that the answer is not over when the server is told to end
# asks the server from inside, since nothing outside the container reaches its network
CLIENT = """
import json, sys, urllib.request as r
path, key, body = sys.argv[1:]
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
request = r.Request(f"http://127.0.0.1:8000{path}", body.encode() or None, headers)
try:
    answer = r.urlopen(request, timeout=30)
except r.HTTPError as error:
    answer = error
print(answer.status, flush=True)
for line in answer:
    sys.stdout.write(line.decode())
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def buildah(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buildah")
    made = Buildah(folder)
    made.make_base()
    yield made
    shutil.rmtree(folder)  # a copy of all files for each image, which pytest would keep for three runs


@pytest.fixture(scope="module")
def signed(compile_case, tmp_path_factory):
    """A shipped file of a tiny model, unpacked, and the public key that its signature fits."""
    folder = tmp_path_factory.mktemp("shipped")
    private, public = make_keys(folder / "keys")
    artifact = Artifact.open(compile_case("windowed").artifact)
    wheels = fetch_wheels(ship.all_packages(artifact.manifest, grammars=False), [PYTHON], folder / "wheels")
    write_archive(with_sums(ship.members_of(artifact, wheels, [PYTHON]), private), "tiny", folder / "tiny.tar.zst")
    return unpack(folder / "tiny.tar.zst", folder / "unpacked"), public


@pytest.fixture(scope="module")
def image(buildah, signed):
    context, public = signed
    (context / ".venv").mkdir()  # an install on this machine, which the image must not get
    (context / ".venv" / "left").touch()
    return buildah.build(context, "--secret", f"id=signing.pub,src={public}", "--build-arg", "VERSION=17")


@pytest.fixture(scope="module")
def files(buildah, image):
    return buildah.files(image)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    return path


def client(running, path, body=None, key=KEY):
    """A client inside that prints the status and then the body, line by line."""
    python = "/serving/.venv/bin/python"
    return running.start(python, "-I", "-c", CLIENT, path, key, "" if body is None else json.dumps(body))


def asked(running, path, body=None, key=KEY):
    """Status and body of the server's answer."""
    output, errors = client(running, path, body, key).communicate(timeout=60)
    assert errors == ""
    status, _, text = output.partition("\n")
    return int(status), json.loads(text)


def wait_until_served(running):
    """Read what the server prints up to its address."""
    lines = []
    for line in running.outer.stdout:
        lines.append(line)
        if " is served at http://0.0.0.0:" in line:
            return
    raise AssertionError("".join(lines))


def test_the_server_answers_and_drains(buildah, image, files, keys):
    settings = buildah.settings(image)
    health = settings["Healthcheck"]["Test"]
    assert health[0] == "CMD"
    with container(files, settings, keys) as running:
        wait_until_served(running)
        status = running.status()
        assert status["Uid"].split() == ["10001"] * 4
        assert (int(status["CapPrm"], 16), status["NoNewPrivs"], status["Groups"]) == (0, "1", "")
        assert status["NSpid"].split()[-1] == "1"
        assert "ro" in running.mounted()["/"]
        healthy = running.run(*health[1:])
        assert (healthy.returncode, healthy.stderr) == (0, "")
        name = asked(running, "/v1/models")[1]["data"][0]["id"]
        body = {"model": name, "prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        code, answer = asked(running, "/v1/completions", body)
        assert (code, answer["usage"]["completion_tokens"]) == (200, 6)
        assert asked(running, "/v1/completions", body, key="wrong")[0] == 401
        streaming = client(running, "/v1/completions", {**body, "max_tokens": LONG, "stream": True})
        assert streaming.stdout.readline() == "200\n"
        assert running.stop() == 0
        rest, _ = streaming.communicate(timeout=60)
        events = [line for line in rest.splitlines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in events[-2].replace(" ", "")


def test_a_server_that_is_gone_is_unhealthy(buildah, image, files, keys):
    """The command of the health check, where nobody listens: another port."""
    settings = buildah.settings(image)
    with container(files, settings, keys, *settings["Cmd"], "--port", "8001") as running:
        wait_until_served(running)
        assert running.run(*settings["Healthcheck"]["Test"][1:]).returncode != 0
        assert running.stop() == 0


def test_without_keys_it_refuses_to_listen_to_others(buildah, image, files, keys):
    with container(files, buildah.settings(image), keys, "--host", "0.0.0.0") as running:
        said, _ = running.outer.communicate(timeout=60)
        assert running.outer.returncode == 2
        assert said.startswith("error: host is 0.0.0.0, which other machines reach, and there are no API keys")


def test_the_image_holds_what_runs_and_nothing_else(buildah, image, files):
    serving = files / "serving"
    assert sorted(os.listdir(serving)) == [".venv", "artifact", "runtime", "sbom.cdx.json"]
    assert not (serving / ".venv" / "left").exists()
    for path in serving.rglob("*"):
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (0, 0)
        assert path.is_symlink() or (found.st_mode & 0o044 == 0o044 and not found.st_mode & 0o022), path
    settings = buildah.settings(image)
    assert settings["Labels"]["org.opencontainers.image.version"] == "17"
    assert list(settings["ExposedPorts"]) == ["8000/tcp"]


def test_a_file_signed_by_another_key_is_not_built(buildah, signed, tmp_path):
    _, other = make_keys(tmp_path)
    with pytest.raises(AssertionError, match=r"was signed by another key than /run/secrets/signing\.pub"):
        buildah.build(signed[0], "--secret", f"id=signing.pub,src={other}")
