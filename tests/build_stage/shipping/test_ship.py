"""The shipped file verifies, signed and whole, after an install without a network in an empty environment.

It has the same bytes every time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import urllib.request
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
import zstandard
from filelock import FileLock, Timeout

from build.shipping import ship
from build.shipping.archive import with_sums, write_archive
from build.shipping.keys import make_keys
from build.shipping.wheels import fetch_wheels
from export.stage import ROOT
from runtime.artifact.folder import Artifact
from runtime.artifact.targets import TARGETS
from runtime.engines.tvm_runtime import RUNTIME_LIBRARY
from runtime.errors import UserError
from tests.helpers.shipped import (
    GRAMMARS_LIMIT,
    OWN_LIMIT,
    PYTHON,
    SERVER_LIMIT,
    box_environment,
    grammar_bytes,
    install,
    on_the_box,
    own_bytes,
    server_bytes,
    unpack,
)

SHIP = (sys.executable, "-m", "build.shipping.ship", "windowed.yaml")


@pytest.fixture(scope="module")
def shipped(compile_case, tmp_path_factory):
    """The folder to which a copy of a case was shipped, signed, and the public key."""
    folder = tmp_path_factory.mktemp("ship") / "windowed"
    shutil.copytree(compile_case("windowed").folder, folder)
    private, public = make_keys(folder / "keys")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*SHIP, "--pythons", PYTHON, "--key", private, "--build", "17"]
    result = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    assert "tar --zstd -xf windowed.tar.zst && cd windowed && ./install.sh --public-key FILE" in result.stdout
    return folder, public


@pytest.fixture(scope="module")
def box(shipped, tmp_path_factory):
    """The shipped file, unpacked and installed."""
    folder, public = shipped
    box = unpack(folder / "out" / "windowed.tar.zst", tmp_path_factory.mktemp("box"))
    result = install(box, "--public-key", public)
    assert "This machine can run it." in result.stdout, result.stderr
    assert "signed by" in result.stdout  # the doctor was given the key
    return box


def test_it_generates_the_same_tokens(shipped, box):
    folder, _ = shipped
    arguments = ["--prompt-ids", "1,2,3", "--max-tokens", "6", "--json"]
    there = on_the_box(box, "runtime.generate", "artifact", *arguments)
    assert there.returncode == 0, there.stderr
    here = subprocess.run(
        [sys.executable, "-m", "runtime.generate", folder / "out/windowed", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(there.stdout)["token_ids"] == json.loads(here.stdout)["token_ids"]


def test_the_box_has_no_compiler_and_little_of_ours(box):
    names = {path.name for path in next(box.glob(".venv/lib/*/site-packages")).iterdir()}
    assert not {"torch", "onnx", "onnxruntime", "tvm", "transformers"} & names
    assert {"tvm_ffi", "msgspec", "nacl"} <= names
    assert (box / "runtime" / "lib" / RUNTIME_LIBRARY).is_file()
    assert own_bytes(box) <= OWN_LIMIT
    assert server_bytes(box) <= SERVER_LIMIT
    assert grammar_bytes(box) <= GRAMMARS_LIMIT


def test_it_serves(box):
    """Chat, a text, the page; it ends with status 0 when it is told to."""
    command = [box / ".venv/bin/python", "-m", "runtime.serve", "artifact", "--port", "0"]
    server = subprocess.Popen(command, cwd=box, env=box_environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split(" is served at ")[1].split(" ")[0]
        name = json.loads(fetched(f"{address}v1/models"))["data"][0]["id"]
        asked = {"model": name, "prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0, "logprobs": 0}
        answer = json.loads(fetched(f"{address}v1/completions", asked))
        generated = on_the_box(
            box, "runtime.generate", "artifact", "--prompt-ids", "1,2,3", "--max-tokens", "6", "--json"
        )
        assert answer["choices"][0]["text"] == json.loads(generated.stdout)["text"]
        assert b"<title>" in fetched(address)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def fetched(address, body=None):
    """The body of an answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60).read()


def test_verify_replays_golden_prompts_and_checks_the_signature(shipped, box):
    _, public = shipped
    result = on_the_box(box, "runtime.verify", "artifact", "--public-key", str(public), "--json")
    assert result.returncode == 0, result.stderr
    checks = {check["check"]: check["ok"] for check in json.loads(result.stdout)["checks"]}
    assert all(checks.values())
    assert {"signature", "golden prompt of 5 tokens", "greedy tokens after 5"} <= checks.keys()
    assert sum("golden prompt" in name for name in checks) == 2


def test_tampering_on_the_box_is_refused(shipped, box, tmp_path):
    _, public = shipped
    folder = tmp_path / "artifact"
    shutil.copytree(box / "artifact", folder)
    data = bytearray((folder / "library.so").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "library.so").write_bytes(data)
    result = on_the_box(box, "runtime.generate", str(folder), "--prompt-ids", "1", RUNTIME_PUBLIC_KEY=str(public))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "library.so is damaged" in result.stderr
    (folder / "manifest.sig").unlink()
    result = on_the_box(box, "runtime.generate", str(folder), "--prompt-ids", "1", RUNTIME_PUBLIC_KEY=str(public))
    assert "is not signed, but a signature by" in result.stderr


def test_the_same_inputs_give_the_same_bytes(shipped, tmp_path):
    folder, _ = shipped
    with contextlib.chdir(folder):
        artifact = Artifact.open(Path("out/windowed"))
        wheels = fetch_wheels(ship.all_packages(artifact.manifest, grammars=True), [PYTHON], Path("out/.work/wheels"))
        members = with_sums(ship.members_of(artifact, wheels, [PYTHON]), folder / "keys" / "signing.key")
        write_archive(members, "windowed", tmp_path / "again.tar.zst")
    first, second = (
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "out/windowed.tar.zst", tmp_path / "again.tar.zst")
    )
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["again.tar.zst"]


def test_names_are_sorted_and_nothing_tells_who_made_it(shipped):
    folder, _ = shipped
    data = zstandard.ZstdDecompressor().stream_reader(BytesIO((folder / "out/windowed.tar.zst").read_bytes())).read()
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {
        (0, 0, 0, "", "")
    }
    assert [member.name for member in members if member.mode & stat.S_IXUSR] == ["windowed/install.sh"]


def test_pip_checks_the_packages_too(shipped, tmp_path):
    """Where a changed package and its sum were changed together, in a file that nobody checked by a key."""
    box = unpack(shipped[0] / "out" / "windowed.tar.zst", tmp_path)
    wheel = next(box.glob("wheels/msgspec*.whl"))
    old = wheel.read_bytes()
    wheel.write_bytes(old + b"x")
    sums = [hashlib.sha256(data).hexdigest() for data in (old, old + b"x")]
    (box / "SHA256SUMS").write_text((box / "SHA256SUMS").read_text().replace(*sums))
    result = install(box)
    assert result.returncode == 2
    assert result.stderr.startswith("error: pip could not install the packages in ")
    assert sums[1] in result.stderr


def test_the_box_refuses_an_older_build(box, shipped):
    _, public = shipped
    key = {"RUNTIME_PUBLIC_KEY": str(public)}
    assert on_the_box(box, "runtime.verify", "artifact", "--minimum-build", "17", **key).returncode == 0
    result = on_the_box(box, "runtime.generate", "artifact", "--prompt-ids", "1", RUNTIME_MINIMUM_BUILD="18", **key)
    assert result.returncode == 2
    assert result.stderr == (
        "error: artifact has build number 17, but 18 or newer is required (--minimum-build or RUNTIME_MINIMUM_BUILD); "
        "get the newest artifact from its maker\n"
    )


def test_two_runs_at_once_give_an_archive_of_one(shipped, tmp_path):
    """And each shows what it has written; what a killed run left is gone."""
    folder = tmp_path / "windowed"
    shutil.copytree(shipped[0], folder)
    (folder / "out" / ".windowed.tar.zst.tmp").write_text("left by a killed run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen([*SHIP, "--pythons", PYTHON, "--build", number], cwd=folder, env=environment)
        for number in ("1", "2")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    box = unpack(folder / "out" / "windowed.tar.zst", tmp_path / "box")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=box, check=True)
    shipped_now = Artifact.open(box / "artifact").manifest
    assert shipped_now.build_number in (1, 2)
    assert shipped_now == Artifact.open(folder / "out" / "windowed").manifest
    assert not (box / "artifact" / "manifest.sig").exists()
    assert [path.name for path in (folder / "out").glob(".*tar*")] == []


def test_the_workspace_is_held_until_the_archive_is_written(compile_case, tmp_path, monkeypatch):
    """So no other run of this config, be it a compile, replaces files that go into it."""
    shutil.copytree(compile_case("windowed").folder, tmp_path / "windowed")
    monkeypatch.chdir(tmp_path / "windowed")
    held = []

    def write(_members, _name, _target):
        with pytest.raises(Timeout), FileLock("out/.work/windowed/lock", timeout=0):
            pass
        held.append(Artifact.open(Path("out/windowed")).manifest.build_number)
        raise KeyboardInterrupt

    monkeypatch.setattr(ship, "compile_held", lambda job: Artifact.open(job.artifact))
    monkeypatch.setattr(ship, "with_golden", lambda artifact, _job: artifact)
    monkeypatch.setattr(ship, "fetch_wheels", lambda *_: [])
    monkeypatch.setattr(ship, "write_archive", write)
    monkeypatch.setattr(sys, "argv", ["ship", "windowed.yaml", "--build", "5"])
    with pytest.raises(KeyboardInterrupt):
        ship.main()
    assert held == [5]
    with FileLock("out/.work/windowed/lock", timeout=0):
        pass


@pytest.mark.parametrize("pythons", ["2.7", "", "3.11 9.9"])
def test_pythons_without_packages_are_refused(shipped, pythons, monkeypatch):
    monkeypatch.chdir(shipped[0])
    monkeypatch.setattr(sys, "argv", ["ship", "windowed.yaml", "--pythons", pythons])
    with pytest.raises(UserError, match=r"expected some of 3\.11 3\.12 3\.13"):
        ship.main()


@pytest.mark.parametrize("number", ["-1", "1.5", "", "x", "٣", str(2**53 + 1), "1" * 5000])
def test_a_build_that_is_no_number_is_refused(number, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ship", "windowed.yaml", f"--build={number}"])
    with pytest.raises(UserError, match=r"^--build is .*, expected a whole number from 0 to 9007199254740992$"):
        ship.main()


def test_a_cuda_artifact_takes_the_cuda_libraries_along(shipped):
    artifact = Artifact.open(shipped[0] / "out/windowed")
    target = msgspec.structs.replace(artifact.manifest.target, kind="cuda")
    members = ship.members_of(
        Artifact(artifact.folder, msgspec.structs.replace(artifact.manifest, target=target)), [], [PYTHON]
    )
    assert {f"runtime/lib/{name}" for name in (RUNTIME_LIBRARY, *TARGETS["cuda"].libraries)} <= members.keys()
    assert sum(member.size for path, member in members.items() if path.startswith("runtime/")) < 6e6


@pytest.mark.parametrize("gpu_check", [False, True])
def test_the_gpu_check_travels_only_where_it_is_asked_for(gpu_check):
    members = ship.system_members("cuda", [], [PYTHON], gpu_check=gpu_check)
    checks = {path for path in members if path == "runtime/gpucheck.py" or path.startswith("runtime/gpu_check/")}
    assert bool(checks) == gpu_check
    assert {"runtime/generate.py", "runtime/engines/cuda.py", "runtime/artifact/folder.py"} <= members.keys()
