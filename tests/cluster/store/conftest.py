"""An artifact in many small pieces, an S3 server, and stores in every kind of place."""

import shutil

import pytest

from cluster.store.storage import Store
from runtime.artifact import hashing
from tests.helpers.stores import BUCKET, PIECE, change_last_weight, rewritten, s3_server


@pytest.fixture(scope="session")
def compiled_artifact(compile_case):
    return compile_case("windowed").artifact


@pytest.fixture(scope="session")
def versions(compiled_artifact, tmp_path_factory):
    """Two versions in small pieces, which tests copy."""
    folder = tmp_path_factory.mktemp("versions")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hashing, "BLOCK_BYTES", PIECE)
        return (
            rewritten(compiled_artifact, folder / "first"),
            rewritten(compiled_artifact, folder / "second", change_last_weight),
        )


@pytest.fixture(autouse=True)
def small_pieces(versions, monkeypatch):
    monkeypatch.setattr(hashing, "BLOCK_BYTES", PIECE)


@pytest.fixture
def artifact(versions, tmp_path):
    return shutil.copytree(versions[0], tmp_path / "made" / "demo")


@pytest.fixture
def newer(versions, tmp_path):
    return shutil.copytree(versions[1], tmp_path / "newer" / "demo")


@pytest.fixture(scope="session")
def s3_address():
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address, monkeypatch, tmp_path):
    """The address of an empty store in S3, which the usual variables lead to."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture(params=["folder", "s3", "memory"])
def store(request, tmp_path):
    """An empty store in a folder, in S3, and in another place that fsspec knows."""
    if request.param == "s3":
        return Store.open(request.getfixturevalue("s3"))
    return Store.open(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


@pytest.fixture
def folder_store(tmp_path):
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "got" / "demo"
