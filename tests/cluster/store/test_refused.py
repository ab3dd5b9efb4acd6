"""What is refused, in one sentence each: damage, other signers, old builds, and places that are not there."""

import hashlib
import json
import os

import pytest

from build.shipping.keys import make_keys, sign
from cluster.store import list as listing
from cluster.store.layout import Reference, blob_path, pointer_path, version_path
from cluster.store.pull import Trust, artifact_at, pull
from cluster.store.push import push
from cluster.store.storage import Store
from runtime.artifact.build_number import MINIMUM_VARIABLE
from runtime.artifact.consistency import MANIFEST_FILE, WEIGHTS_FILE
from runtime.artifact.folder import read_manifest
from runtime.artifact.signing import KEY_VARIABLE, SIGNATURE_FILE
from runtime.errors import UserError
from tests.helpers.stores import BUCKET, beside, command, contents, counted

NO_KEY = Trust(None, 0)
DEMO = Reference.read("demo")


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("other-keys"))


def refused(pattern):
    return pytest.raises(UserError, match=rf"(?s)^{pattern}$")


def a_piece(artifact):
    """Where a piece in the middle of the weights is stored."""
    (weights,) = (entry for entry in read_manifest(artifact).files if entry.path == WEIGHTS_FILE)
    return blob_path(weights.blocks[1])


@pytest.mark.parametrize("spoil", [lambda data: data[:-1] + b"?", lambda data: data[:-1], lambda data: b""])
def test_a_damaged_piece_is_refused_and_the_target_stays(store, artifact, newer, target, spoil):
    push(newer, store)
    pull(store, DEMO, target, NO_KEY)
    before = contents(target)
    target.rename(target.with_name("aside"))  # so that nothing is at hand
    push(artifact, store)
    path = a_piece(artifact)
    whole = store.read(path, 2**24)
    store.write(path, spoil(whole))
    with refused(rf"demo@\w{{12}} was not pulled: {path} in the store .* is damaged: .*; remove it, and push .* again"):
        pull(store, DEMO, target, NO_KEY)
    assert not target.exists()
    assert contents(target.with_name("aside")) == before
    store.write(path, whole)
    pull(store, DEMO, target, NO_KEY)
    assert contents(target) == contents(artifact)


def test_a_piece_of_another_size_is_sent_again(store, artifact, target):
    """As a store may hold it that does not write a file in one step."""
    push(artifact, store)
    path = a_piece(artifact)
    whole = store.read(path, 2**24)
    store.write(path, whole[:-1])
    assert push(artifact, store).sent_bytes == len(whole)
    pull(store, DEMO, target, NO_KEY)


def test_a_missing_piece_and_a_damaged_record_are_refused(folder_store, artifact, target, tmp_path):
    pushed = push(artifact, folder_store)
    (tmp_path / "store" / a_piece(artifact)).unlink()
    with refused(r"demo@\w{12} was not pulled: the store .* lacks blobs/sha256/\w{64}; push the artifact again"):
        pull(folder_store, DEMO, target, NO_KEY)
    path = version_path("demo", pushed.version)
    folder_store.write(path, folder_store.read(path, 4096).replace(b'"size": ', b'"size":  '))
    with refused(rf"{path} in the store .* is damaged; remove it, and push the artifact again"):
        pull(folder_store, DEMO, target, NO_KEY)
    folder_store.write(pointer_path("demo", "latest"), b'{"version": "../../else"}')
    with refused(r"names/demo/latest\.json in the store .* cannot be read: .*version.*"):
        pull(folder_store, DEMO, target, NO_KEY)


def test_a_signature_is_checked_as_the_runtime_checks_it(store, artifact, target, keys, other_keys, monkeypatch):
    push(artifact, store, tags=["unsigned"])
    sign(artifact, keys[0])
    push(artifact, store)
    pull(store, DEMO, target, Trust(keys[1], 0))
    assert contents(target) == contents(artifact)
    before = contents(target)
    with refused(r"demo@\w{12} was not pulled: .*signed by another key than .*; do not use it.*"):
        pull(store, DEMO, target, Trust(other_keys[1], 0))
    with refused(r"demo@\w{12} was not pulled: .* is not signed, but a signature by .* is required.*"):
        pull(store, Reference.read("demo@unsigned"), target, Trust(keys[1], 0))
    assert contents(target) == before
    assert beside(target) == []
    monkeypatch.setenv(KEY_VARIABLE, str(other_keys[1]))
    with refused(r"demo@\w{12} was not pulled: .*signed by another key.*"):
        pull(store, DEMO, target, Trust.required())
    with refused(r".*signed by another key.*"):
        push(artifact, store)


def test_a_wrong_signature_is_refused_before_any_piece_is_fetched(folder_store, artifact, target, keys, monkeypatch):
    push(artifact, folder_store)
    read = counted(monkeypatch, "read")
    with refused(r".* is not signed, .*"):
        pull(folder_store, DEMO, target, Trust(keys[1], 0))
    assert read == [(artifact / MANIFEST_FILE).stat().st_size]


def test_a_manifest_that_the_signature_is_not_of_is_refused(folder_store, artifact, target, keys):
    """A store whose owner rewrites everything that has sums, but cannot sign."""
    sign(artifact, keys[0])
    signature = (artifact / SIGNATURE_FILE).read_bytes()
    path = artifact / MANIFEST_FILE
    fields = json.loads(path.read_bytes())
    fields["tools"]["apache-tvm"] = "0.0.0"
    path.write_text(json.dumps(fields))
    (artifact / SIGNATURE_FILE).write_bytes(signature)
    push(artifact, folder_store)
    pull(folder_store, DEMO, target, NO_KEY)
    with refused(r"demo@\w{12} was not pulled: .* was changed after it was signed.*"):
        pull(folder_store, DEMO, target, Trust(keys[1], 0))


def test_a_cached_version_is_checked_with_the_key_that_is_asked_for(folder_store, artifact, tmp_path, keys, other_keys):
    sign(artifact, keys[0])
    push(artifact, folder_store)
    address, cache = f"file://{folder_store.address}/demo", tmp_path / "cache"
    found = artifact_at(address, cache)
    assert artifact_at(address, cache, keys[1]) == found
    with refused(r"demo@\w{12} was not pulled: .*signed by another key.*"):
        artifact_at(address, cache, other_keys[1])
    (found / "library.so").write_bytes(b"\x7f")
    assert contents(artifact_at(address, cache, keys[1])) == contents(artifact)


def test_an_older_build_than_required_is_refused(folder_store, artifact, target, monkeypatch):
    push(artifact, folder_store)
    monkeypatch.setenv(MINIMUM_VARIABLE, "3")
    with refused(r"demo@\w{12} was not pulled: .* has build number 0, but 3 or newer is required.*"):
        pull(folder_store, DEMO, target, Trust.required())


def test_a_path_out_of_the_folder_is_refused(folder_store, artifact, target):
    """A store whose owner rewrites everything that has sums."""
    path = artifact / MANIFEST_FILE
    text = path.read_text().replace('"path":"library.so"', '"path":"../library.so"')
    assert "../library.so" in text
    pushed = push(artifact, folder_store)
    record = json.loads(folder_store.read(version_path("demo", pushed.version), 4096))
    record["manifest"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    data = json.dumps(record).encode()
    version = hashlib.sha256(data).hexdigest()
    folder_store.write(blob_path(record["manifest"]["sha256"]), text.encode())
    folder_store.write(version_path("demo", version), data)
    with refused(r"demo@\w{12} was not pulled: .*the file name '\.\./library\.so' is not allowed.*"):
        pull(folder_store, Reference.read(f"demo@{version}"), target, NO_KEY)
    assert list(target.parent.iterdir()) == []


def test_a_target_that_is_no_artifact_is_refused(folder_store, artifact, target):
    push(artifact, folder_store)
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("mine")
    with refused(r".* exists and is not an artifact \(it holds 'thesis\.txt'\).*"):
        pull(folder_store, DEMO, target, NO_KEY)
    assert contents(target) == {"thesis.txt": b"mine"}
    other = target.with_name("other")
    other.with_name(".other.pull").mkdir()
    (other.with_name(".other.pull") / "thesis.txt").write_text("mine")
    with refused(r".*\.other\.pull is in the way, and no pull has left it \(it holds 'thesis\.txt'\); move it"):
        pull(folder_store, DEMO, other, NO_KEY)


def test_a_linked_file_is_never_written_to(folder_store, artifact, newer, target):
    """What a pull has left may be linked to an artifact that is open."""
    push(newer, folder_store)
    fresh = target.with_name(".demo.pull")
    fresh.mkdir(parents=True)
    before = contents(artifact)
    for path in artifact.iterdir():
        os.link(path, fresh / path.name)
    pull(folder_store, DEMO, target, NO_KEY)
    assert contents(target) == contents(newer)
    assert contents(artifact) == before


def test_names_that_are_not_there_are_answered_with_those_that_are(store, artifact, target):
    with refused(r"(the store .* has no demo@latest, nor any other artifact; .*|there is no .*; check the address)"):
        pull(store, DEMO, target, NO_KEY)
    push(artifact, store, tags=["v1", "v2"])
    for name in ("demo", "demo@v3", "demo@" + "0" * 8, "demo@" + "0" * 64):
        with refused(r"the store .* has no demo@.*, but it has demo@v1, demo@v2; name one of those"):
            pull(store, Reference.read(name), target, NO_KEY)
    with refused(r"the store .* has no other@latest, but it has demo; name one of those"):
        pull(store, Reference.read("other"), target, NO_KEY)
    for name in ("../demo", "a/b", "", ".demo", "demo@", "demo@../x", "demo@a@b"):
        with refused(r".* names no artifact of a store, expected NAME, NAME@TAG or NAME@VERSION.*"):
            pull(store, Reference.read(name), target, NO_KEY)
    for options in ({"name": "../demo"}, {"name": ""}, {"tags": ["a/b"]}, {"tags": ["a" * 64]}):
        with refused(r"the (name|tag) '.*' cannot be used in a store.*"):
            push(artifact, store, **options)


def test_places_that_are_not_there(s3, artifact, target, monkeypatch, tmp_path):
    absent = Store.open("s3://no-such-bucket/prefix")
    with refused(r"there is no bucket no-such-bucket, which the store s3://no-such-bucket/prefix lies in; .*"):
        pull(absent, DEMO, target, NO_KEY)
    with refused(r"the store s3://no-such-bucket/prefix cannot be written to: The specified bucket does not exist; .*"):
        push(artifact, absent)
    with refused(r"there is no folder .*/nowhere, which the store .* lies in; check the address"):
        list(listing.rows(Store.open(str(tmp_path / "nowhere"))))
    for address in ("nonsense://x/y", "s3://", "/"):
        with refused(r"the store .* (cannot be used: .*|has no folder or bucket, .*)"):
            Store.open(address)
    for address in ("s3://demo", "s3:///demo", "://x/demo"):
        with refused(r".* names no artifact in a store, .*"):
            artifact_at(address, tmp_path / "cache")


def test_no_credentials_and_no_server_are_one_sentence_each(s3, tmp_path):
    """In other processes: s3fs keeps what it has found out."""
    hidden = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    nothing = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    done = command("cluster.store.pull", f"s3://{BUCKET}/x", "demo", tmp_path / "got", **hidden, **nothing)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the store s3://{BUCKET}/x cannot be read: Unable to locate credentials; ")
    assert done.stderr.count("\n") == 1
    done = command(
        "cluster.store.list", f"s3://{BUCKET}/x", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1"
    )
    assert done.returncode == 2
    assert "Could not connect to the endpoint URL" in done.stderr
    assert done.stderr.count("\n") == 1
