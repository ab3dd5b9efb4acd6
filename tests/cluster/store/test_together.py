"""Several at once: pushes of two versions, pulls into one cache, and a pull below an artifact that is in use."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.store import pull as pulling
from cluster.store.layout import Reference
from cluster.store.lookup import versions_of
from cluster.store.pull import Trust, artifact_at, pull
from cluster.store.push import push
from cluster.store.storage import Store
from export.stage import ROOT
from runtime.engines.engine import Engine
from tests.helpers.stores import END_SECONDS, SMALL_PIECES, contents

NO_KEY = Trust(None, 0)
CACHED = (
    SMALL_PIECES + "import sys; from pathlib import Path; from cluster.store.pull import artifact_at as a; "
    "print(a(sys.argv[1], Path(sys.argv[2])))"
)


def test_two_pushes_at_once_leave_both_versions_whole(store, artifact, newer, target):
    with ThreadPoolExecutor(4) as pool:
        pushed = list(pool.map(lambda folder: push(folder, store), [artifact, newer] * 2))
    assert set(versions_of(store, "demo")) == {one.version for one in pushed}
    for one, folder in zip(pushed[:2], (artifact, newer), strict=True):
        pull(store, Reference.read(f"demo@{one.version}"), target, NO_KEY)
        assert contents(target) == contents(folder)
    assert pull(store, Reference.read("demo"), target, NO_KEY).found.version in {one.version for one in pushed}


def test_an_open_artifact_goes_on_while_its_folder_is_replaced(artifact, newer, folder_store, target):
    push(artifact, folder_store)
    pull(folder_store, Reference.read("demo"), target, NO_KEY)
    engine = Engine.open(target, threads=1)
    before = np.array(engine.prefill(0, [5, 6, 7]))
    push(newer, folder_store)
    pull(folder_store, Reference.read("demo"), target, NO_KEY)
    engine.rewind(0, 0)
    assert np.array_equal(engine.prefill(0, [5, 6, 7]), before)
    assert contents(target) == contents(newer)
    Engine.open(target, threads=1)


def test_a_local_folder_is_returned_as_it_is(artifact, tmp_path):
    assert artifact_at(str(artifact), tmp_path / "cache") == artifact
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["file", "s3"])
def test_a_version_is_pulled_into_the_cache_once(place, request, artifact, newer, tmp_path, monkeypatch):
    address = request.getfixturevalue("s3") if place == "s3" else f"file://{tmp_path}/store"
    store = Store.open(address)
    gathered = []
    whole = pulling._gather
    monkeypatch.setattr(pulling, "_gather", lambda *rest: gathered.append(whole(*rest)) or gathered[-1])
    first = push(artifact, store)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: artifact_at(f"{address}/demo", tmp_path / "cache"), range(4)))
    assert found == {tmp_path / "cache" / first.version / "demo"}
    assert len(gathered) == 1
    second = push(newer, store)
    assert artifact_at(f"{address}/demo/", tmp_path / "cache") == tmp_path / "cache" / second.version / "demo"
    assert gathered[1:] == [second.sent_bytes]
    assert contents(artifact_at(f"{address}/demo@{first.version}", tmp_path / "cache")) == contents(artifact)
    assert len(gathered) == 2


def test_processes_that_ask_at_once_get_one_folder(s3, artifact, tmp_path):
    push(artifact, Store.open(s3))
    arguments = [sys.executable, "-c", CACHED, f"{s3}/demo", str(tmp_path / "cache")]
    running = [subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=END_SECONDS)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(folders) == 1
