"""Keys and signatures: a signed artifact opens; any changed byte, another key or a missing signature is refused.

The refusal comes before anything is loaded.
"""

import errno
import hashlib
import os
import shutil
import stat
import sys

import pytest

from build.shipping.keys import PRIVATE_FILE, PUBLIC_FILE, make_keys, sign
from runtime.artifact.folder import Artifact, replace_manifest
from runtime.artifact.signing import KEY_VARIABLE, SIGNATURE_FILE
from runtime.doctor import examine
from runtime.engines.engine import Engine
from runtime.errors import UserError


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(compile_case, keys, tmp_path):
    folder = tmp_path / "signed"
    shutil.copytree(compile_case("windowed").artifact, folder)
    sign(folder, keys[0])
    return folder


def test_a_signed_artifact_opens_with_and_without_the_key(signed, keys):
    assert Artifact.open(signed, public_key=keys[1]).manifest == Artifact.open(signed).manifest


def test_keys_are_new_each_time_private_and_never_replaced(keys, tmp_path):
    private, _ = make_keys(tmp_path)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_text() != keys[0].read_text()
    before = private.read_bytes()
    with pytest.raises(UserError, match=f"{PRIVATE_FILE} exists, and a key that was replaced is lost"):
        make_keys(tmp_path)
    private.unlink()
    with pytest.raises(UserError, match=f"{PUBLIC_FILE} exists"):
        make_keys(tmp_path)
    assert not private.exists()
    assert before.startswith(b"ed25519-private-key ")


@pytest.mark.parametrize("name", ["file", "file/below", "read-only", "dangling"])
def test_keys_that_cannot_be_written_are_refused_without_a_trace(tmp_path, name, monkeypatch):
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent" / "below")
    if name == "read-only":  # root may write anywhere
        monkeypatch.setattr("os.open", lambda path, *_: (_ for _ in ()).throw(PermissionError(13, "Denied", path)))
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=rf"^keys cannot be written to .*{name}: .*; choose another with FOLDER=\.\.\.$"
    ):
        make_keys(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "somebody's"


def test_a_public_key_that_cannot_be_written_takes_the_private_one_along(tmp_path, monkeypatch):
    whole = os.open

    def fail(path, *arguments):
        if str(path).endswith(PUBLIC_FILE):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return whole(path, *arguments)

    monkeypatch.setattr("os.open", fail)
    with pytest.raises(UserError, match="No space left on device"):
        make_keys(tmp_path / "keys")
    assert list((tmp_path / "keys").iterdir()) == []


@pytest.mark.parametrize("name", ["library.so", "weights.safetensors", "tokenizer.json"])
def test_a_changed_byte_of_any_file_is_refused(signed, keys, name):
    path = signed / name
    data = bytearray(path.read_bytes())
    for place in (0, len(data) // 2, len(data) - 1):
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            Artifact.open(signed, public_key=keys[1])
        data[place] ^= 1
    path.write_bytes(data)
    Artifact.open(signed, public_key=keys[1])


def test_a_changed_byte_of_the_manifest_is_refused_before_it_is_read(signed, keys):
    path = signed / "manifest.json"
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="was changed after it was signed, or was signed by another key"):
            Artifact.open(signed, public_key=keys[1])


def test_a_file_and_its_sum_changed_together_are_refused(signed, keys):
    """The sums alone would let this change through."""
    path, manifest = signed / "tokenizer.json", signed / "manifest.json"
    old = path.read_bytes()
    new = old.replace(b"{", b"{", 1)[:-1] + b" "
    path.write_bytes(new)
    manifest.write_text(manifest.read_text().replace(hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest()))
    Artifact.open(signed)
    with pytest.raises(UserError, match="was changed after it was signed"):
        Artifact.open(signed, public_key=keys[1])


def test_another_key_and_a_missing_signature_are_refused(signed, keys, tmp_path):
    _, other = make_keys(tmp_path / "other")
    with pytest.raises(UserError, match=r"or was signed by another key than .*signing\.pub"):
        Artifact.open(signed, public_key=other)
    (signed / SIGNATURE_FILE).unlink()
    with pytest.raises(UserError, match="is not signed, but a signature by"):
        Artifact.open(signed, public_key=keys[1])


NO_SIGNATURES = [
    "",
    "ed25519-signature",
    "ed25519-signature AAAA",
    "ed25519-signature ***",
    "ed25519-public-key " + "A" * 43 + "=",
]


@pytest.mark.parametrize("text", [*NO_SIGNATURES, "\xff" * 99, "ed25519-signature " + "\xff" * 64])
def test_a_broken_signature_file_is_refused(signed, keys, text):
    (signed / SIGNATURE_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="holds no ed25519-signature"):
        Artifact.open(signed, public_key=keys[1])


def test_a_private_key_is_no_public_key_and_a_missing_one_is_named(signed, keys, tmp_path):
    with pytest.raises(UserError, match=r"signing\.key holds no ed25519-public-key"):
        Artifact.open(signed, public_key=keys[0])
    with pytest.raises(UserError, match=r"absent\.pub cannot be read"):
        Artifact.open(signed, public_key=tmp_path / "absent.pub")
    with pytest.raises(UserError, match=r"signing\.pub holds no ed25519-private-key"):
        sign(signed, keys[1])


def test_the_environment_makes_every_engine_ask(signed, keys, compile_case, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, str(keys[1]))
    assert Engine.open(signed, threads=1).manifest.name == "windowed"
    with pytest.raises(UserError, match="is not signed"):
        Engine.open(compile_case("windowed").artifact, threads=1)


def test_a_new_manifest_takes_the_signature_away(signed, keys):
    replace_manifest(signed, Artifact.open(signed).manifest)
    assert not (signed / SIGNATURE_FILE).exists()
    with pytest.raises(UserError, match="is not signed"):
        Artifact.open(signed, public_key=keys[1])


def test_an_empty_variable_is_refused_rather_than_no_check(signed, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(UserError, match="RUNTIME_PUBLIC_KEY is empty"):
        Engine.open(signed, threads=1)


def test_the_doctor_asks_too(signed, keys, compile_case, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, str(keys[1]))
    assert [finding.found for finding in examine(signed) if finding.check == "artifact"] == [
        f"windowed, 5 files sound, signed by {keys[1]}"
    ]
    assert "is not signed" in next(
        finding.found for finding in examine(compile_case("windowed").artifact) if finding.check == "artifact"
    )


def test_without_the_library_nothing_is_taken_for_signed(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nacl.signing", None)
    with pytest.raises(UserError, match=r"cannot be checked: .*nacl"):
        Artifact.open(signed, public_key=keys[1])
