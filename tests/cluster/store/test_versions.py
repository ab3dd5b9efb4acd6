"""Versions go into a store and come out again; what is stored already is neither sent nor fetched."""

import hashlib
import threading

import pytest

from cluster.store import list as listing
from cluster.store.layout import Reference, blob_path
from cluster.store.pieces import THREADS, pieces_of
from cluster.store.pull import Trust, pull
from cluster.store.push import push
from cluster.store.storage import Store
from runtime.artifact.consistency import MANIFEST_FILE, WEIGHTS_FILE
from runtime.artifact.folder import Artifact, read_manifest
from runtime.errors import UserError
from tests.helpers.stores import PIECE, beside, command, contents, counted, rewritten

NO_KEY = Trust(None, 0)


def pulled(store, name, target):
    return pull(store, Reference.read(name), target, NO_KEY)


def test_what_is_pulled_is_what_was_pushed(store, artifact, target):
    pushed = push(artifact, store)
    found = pulled(store, "demo", target)
    assert contents(target) == contents(artifact)
    assert found.found.version == pushed.version
    assert pushed.sent_bytes == found.fetched_bytes == sum(e.size for e in read_manifest(artifact).files)
    assert beside(target) == []
    assert Artifact.open(target).manifest == read_manifest(artifact)


def test_pieces_lie_under_the_sums_of_their_bytes(store, artifact):
    push(artifact, store)
    names = store.children("blobs/sha256")
    assert len(names) > read_manifest(artifact).files[-1].size // PIECE > 2
    for name in names:
        assert hashlib.sha256(store.read(blob_path(name), 2**24)).hexdigest() == name


def test_a_second_version_sends_and_fetches_only_what_changed(store, artifact, newer, target, monkeypatch):
    push(artifact, store)
    pulled(store, "demo", target)
    sent, received = counted(monkeypatch, "write"), counted(monkeypatch, "read")
    pushed = push(newer, store)
    old, new = ({p.sha256: p.length for p in pieces_of(f, read_manifest(f).files)} for f in (artifact, newer))
    (changed,) = new.keys() - old.keys()
    manifest_bytes = (newer / MANIFEST_FILE).stat().st_size
    assert pushed.sent == (WEIGHTS_FILE,)
    assert pushed.sent_bytes == new[changed]
    assert sorted(sent) == sorted([new[changed], manifest_bytes])
    assert pulled(store, "demo", target).fetched_bytes == new[changed]
    assert sorted(received) == sorted([new[changed], manifest_bytes])
    assert contents(target) == contents(newer)


def test_a_push_of_what_is_there_sends_no_piece(store, artifact, newer):
    first = push(artifact, store)
    push(newer, store)
    again = push(artifact, store)
    assert (again.version, again.sent, again.sent_bytes) == (first.version, (), 0)


def test_tags_move_and_versions_stay(store, artifact, newer, target):
    first, second = push(artifact, store, tags=["v1", "latest"]), push(newer, store)
    assert first.version != second.version
    assert pulled(store, "demo", target).found.version == second.version
    for name in ("demo@v1", f"demo@{first.version}", f"demo@{first.version[:8]}"):
        assert pulled(store, name, target).found.version == first.version
        assert contents(target) == contents(artifact)
    push(newer, store, "other", ["v1"])
    assert pulled(store, "other@v1", target).found.version == second.version


def test_a_list_shows_versions_tags_and_sizes(store, artifact, newer):
    first, second = push(artifact, store, tags=["v1", "stable"]), push(newer, store)
    shown = {row[1]: row for row in listing.rows(store)}
    assert set(shown) == {first.version[:12], second.version[:12]}
    size = sum(path.stat().st_size for path in artifact.iterdir())
    name, _, tags, build, megabytes, signed, date = shown[first.version[:12]]
    assert (name, tags, build, megabytes, signed) == ("demo", "stable v1", "0", f"{size / 1e6:,.1f}", "no")
    assert date[:2] == "20"


def test_a_dry_run_writes_nothing(store, artifact, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", None)
        told = push(artifact, store, dry_run=True)
    assert push(artifact, store) == told


def test_few_pieces_are_in_memory_at_once(folder_store, artifact, target, monkeypatch):
    """Whatever the artifact's size, as many as there are threads, of one block each."""
    counting, running, most, sizes = threading.Lock(), 0, 0, set()
    whole = {method: getattr(Store, method) for method in ("read", "write")}

    def watched(method):
        def call(self, path, argument):
            nonlocal running, most
            with counting:
                running, most = running + 1, max(most, running + 1)
            result = whole[method](self, path, argument)
            with counting:
                running -= 1
                if path.startswith("blobs/"):
                    sizes.add(len(result if method == "read" else argument))
            return result

        return call

    for method in whole:
        monkeypatch.setattr(Store, method, watched(method))
    push(artifact, folder_store)
    pulled(folder_store, "demo", target)
    assert 1 < most <= THREADS
    assert max(sizes - {(artifact / MANIFEST_FILE).stat().st_size}) <= PIECE


def test_the_commands(s3, compiled_artifact, tmp_path):
    """In processes of their own, which have blocks of the usual size."""
    pushed = command("cluster.store.push", compiled_artifact, s3, "--name", "demo", "--tag", "v1")
    assert pushed.returncode == 0, pushed.stderr
    assert f"demo@v1 in {s3} now means it" in pushed.stdout
    got = command("cluster.store.pull", s3, "demo@v1", tmp_path / "got")
    assert got.returncode == 0, got.stderr
    assert contents(tmp_path / "got") == contents(compiled_artifact)
    listed = command("cluster.store.list", s3)
    assert listed.stdout.splitlines()[1].split()[::2][:2] == ["demo", "v1"]
    assert command("cluster.store.pull", s3, "demo", tmp_path / "got").returncode == 2


def test_a_damaged_artifact_is_not_pushed(folder_store, artifact, monkeypatch):
    monkeypatch.setattr(Store, "write", None)
    path = artifact / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
        push(artifact, folder_store)


def test_files_that_two_artifacts_share_are_stored_once(folder_store, artifact, tmp_path):
    push(artifact, folder_store)
    copy = rewritten(artifact, tmp_path / "copy" / "another")
    assert push(copy, folder_store).sent_bytes == 0
