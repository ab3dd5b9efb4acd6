"""Pushes and pulls that are killed (-9): nobody sees a part of one, and the next one goes on."""

import os
import time

import pytest

from cluster.store.layout import Reference
from cluster.store.lookup import names_of, versions_of
from cluster.store.pull import Trust, pull
from cluster.store.push import push
from cluster.store.storage import Store
from runtime.artifact.folder import read_manifest
from tests.helpers.stores import beside, contents, killed

STORE = "cluster.store.storage.Store"
NO_KEY = Trust(None, 0)


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """The address of a store that other processes reach as well."""
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "store")


def size(folder):
    return sum(entry.size for entry in read_manifest(folder).files)


def test_a_killed_push_shows_nothing_and_goes_on(place, artifact, target):
    killed("cluster.store.push", artifact, place, of="cluster.store.storage", function="Store.write", before=4)
    store = Store.open(place)
    assert store.children("blobs/sha256")
    assert names_of(store) == versions_of(store, "demo") == []
    assert 0 < push(artifact, store).sent_bytes < size(artifact)
    pull(store, Reference.read("demo"), target, NO_KEY)
    assert contents(target) == contents(artifact)


def test_a_push_that_is_killed_before_its_tag_moves_leaves_the_old_version(place, artifact, newer, target):
    store = Store.open(place)
    first = push(artifact, store)
    # one piece has changed; then come the manifest, the version's record and the tag
    killed("cluster.store.push", newer, place, of="cluster.store.storage", function="Store.write", before=4)
    assert len(versions_of(store, "demo")) == 2
    assert pull(store, Reference.read("demo"), target, NO_KEY).found.version == first.version
    assert contents(target) == contents(artifact)


def test_a_file_that_was_half_written_is_no_piece(artifact, target, tmp_path):
    """A folder's files are written elsewhere, flushed and renamed."""
    place = tmp_path / "store"
    killed("cluster.store.push", artifact, place, of="runtime.artifact.durable", function="sync", before=1)
    store = Store.open(str(place))
    assert store.children("incoming")
    assert store.children("blobs/sha256") == []
    assert push(artifact, store).sent_bytes == size(artifact)
    pull(store, Reference.read("demo"), target, NO_KEY)
    assert contents(target) == contents(artifact)


def test_abandoned_files_are_removed_after_a_day(artifact, folder_store, tmp_path):
    incoming = tmp_path / "store" / "incoming"
    incoming.mkdir(parents=True)
    for name, age in (("old", 25 * 3600), ("young", 23 * 3600)):
        (incoming / name).write_bytes(b"part")
        os.utime(incoming / name, (time.time() - age,) * 2)
    push(artifact, folder_store)
    assert folder_store.children("incoming") == ["young"]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_killed_pull_leaves_the_target_and_goes_on(place, artifact, newer, target, replaces):
    store = Store.open(place)
    push(artifact, store)
    if replaces:
        pull(store, Reference.read("demo"), target, NO_KEY)
        push(newer, store)
    before = contents(target) if replaces else None
    # a tag and a record are read, the manifest, and then pieces, of which a newer version has one
    reads = 4 if replaces else 8
    killed("cluster.store.pull", place, "demo", target, of="cluster.store.storage", function="Store.read", before=reads)
    assert (contents(target) if target.exists() else None) == before
    assert beside(target)
    again = pull(store, Reference.read("demo"), target, NO_KEY)
    wanted = newer if replaces else artifact
    assert again.fetched_bytes < size(wanted)
    assert contents(target) == contents(wanted)
    assert beside(target) == []


def test_a_pull_that_is_killed_while_it_replaces_is_mended_by_the_next(artifact, newer, folder_store, target):
    """Between two renames there is no folder; the old one lies beside it."""
    push(artifact, folder_store)
    pull(folder_store, Reference.read("demo"), target, NO_KEY)
    push(newer, folder_store)
    # the second rename of a path is that of the new folder
    killed("cluster.store.pull", folder_store.address, "demo", target, of="pathlib", function="Path.rename", before=2)
    assert not target.exists()
    assert pull(folder_store, Reference.read("demo"), target, NO_KEY).fetched_bytes == 0
    assert contents(target) == contents(newer)
    assert beside(target) == []
