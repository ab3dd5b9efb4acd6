"""Build numbers: every command refuses an artifact that is older than the box asks for."""

import importlib

import msgspec
import pytest

from runtime.artifact.build_number import LARGEST, MINIMUM_VARIABLE, build_number, required_build
from runtime.artifact.folder import Artifact, read_manifest
from runtime.artifact.manifest import Manifest, from_json, to_json
from runtime.doctor import examine
from runtime.engines.engine import Engine
from runtime.errors import UserError

COMMANDS = {
    "generate": ["--prompt-ids", "1"],
    "chat": [],
    "demo": [],
    "embed": ["--text", "x"],
    "classify": ["--text", "x"],
    "bench": [],
    "verify": [],
}


@pytest.fixture
def artifact(compile_case):
    """An artifact with build number 0, as a compile makes it."""
    return compile_case("windowed").artifact


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_every_command_refuses_an_older_artifact(artifact, command, by, monkeypatch):
    arguments = [str(artifact), *COMMANDS[command]]
    if by == "flag":
        arguments += ["--minimum-build", "17"]
    else:
        monkeypatch.setenv(MINIMUM_VARIABLE, "17")
    with pytest.raises(UserError, match=r"windowed has build number 0, but 17 or newer is required"):
        importlib.import_module(f"runtime.{command}").main(arguments)


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_the_doctor_finds_it(artifact, by, monkeypatch):
    if by == "variable":
        monkeypatch.setenv(MINIMUM_VARIABLE, "17")
    (found,) = (each for each in examine(artifact, 17 if by == "flag" else 0) if each.check == "artifact")
    assert "has build number 0, but 17 or newer is required" in found.found
    assert found.remedy


def test_the_same_number_and_a_larger_one_open(artifact, monkeypatch):
    numbered = msgspec.structs.replace(read_manifest(artifact), build_number=17)
    monkeypatch.setattr("runtime.artifact.folder.read_manifest", lambda *_: numbered)
    for minimum in (0, 16, 17):
        assert Artifact.open(artifact, minimum_build=minimum).manifest.build_number == 17
    with pytest.raises(UserError, match="has build number 17, but 18"):
        Artifact.open(artifact, minimum_build=18)


def test_a_flag_does_not_lower_what_the_environment_requires(artifact, monkeypatch):
    monkeypatch.setenv(MINIMUM_VARIABLE, "17")
    assert (required_build(), required_build(3), required_build(99)) == (17, 17, 99)
    with pytest.raises(UserError, match="but 17 or newer"):
        Engine.open(artifact, threads=1, minimum_build=3)


@pytest.mark.parametrize("text", ["", "-1", "1.0", "1e3", " 1", "+1", "1_0", "²", str(LARGEST + 1), "9" * 5000])
def test_what_is_no_number_is_refused_rather_than_no_check(text, artifact, monkeypatch):
    monkeypatch.setenv(MINIMUM_VARIABLE, text)
    with pytest.raises(UserError, match=rf"^{MINIMUM_VARIABLE} is .*, expected a whole number from 0 to {LARGEST}$"):
        Engine.open(artifact, threads=1)
    with pytest.raises(UserError, match=r"^--minimum-build is "):
        build_number(text, "--minimum-build")


@pytest.mark.parametrize("number", [-1, LARGEST + 1, 1.5, "1", None, True])
def test_a_manifest_holds_a_number_in_the_range(artifact, number):
    data = msgspec.json.decode(to_json(read_manifest(artifact)))
    data["build_number"] = number
    with pytest.raises(UserError, match="build_number"):
        from_json(msgspec.json.encode(data), Manifest, "manifest.json")
