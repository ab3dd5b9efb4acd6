"""The boxes' wheels: each has a sum that the lock lists, and a cache that is half full is filled up."""

import hashlib
import os
import re
import subprocess

import pytest

from build.shipping.lock import LOCK, lock_text, read_lock
from build.shipping.wheels import fetch_wheels
from runtime.errors import UserError

PACKAGES = ["jinja2", "MarkupSafe"]  # a pure package, and one with a wheel for each Python
PYTHONS = ["3.11", "3.13"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with the wheels of `PACKAGES` from the registry, with their paths."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, fetch_wheels(PACKAGES, PYTHONS, folder)


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of the cache, and the paths of its wheels."""
    folder, _ = filled
    subprocess.run(["cp", "-r", folder, tmp_path / "wheels"], check=True)
    return tmp_path / "wheels"


@pytest.fixture
def no_registry(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")


def names(wheels):
    return [wheel.name for wheel in wheels]


def test_every_wheel_is_locked_and_one_for_several_pythons_comes_once(filled):
    _, wheels = filled
    assert [name.split("-")[0].lower() for name in names(wheels)] == ["jinja2", "markupsafe", "markupsafe"]
    locked = {each for name in PACKAGES for each in read_lock()[name.lower()].sums}
    assert {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels} <= locked


def test_a_full_cache_needs_no_registry(cache, filled, no_registry):
    assert names(fetch_wheels(PACKAGES, PYTHONS, cache)) == names(filled[1])


def test_half_a_cache_is_filled_up(cache, filled):
    """Also one that a killed run left in the middle of a download."""
    for wheel in cache.rglob("markupsafe*.whl"):
        wheel.unlink()
    (cache / "3.11" / "77.download").mkdir()
    (cache / "3.11" / "77.download" / "part").write_text("half")
    assert names(fetch_wheels(PACKAGES, PYTHONS, cache)) == names(filled[1])
    assert sorted(os.listdir(cache / "3.11")) == sorted(os.listdir(filled[0] / "3.11"))


def test_a_wheel_that_is_not_locked_is_refused_once_and_removed(cache, filled):
    wheel = next((cache / "3.11").glob("jinja2*.whl"))
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-1] + b"x")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=re.escape(f"{wheel} had the SHA-256 {found}, expected one that {LOCK} lists")):
        fetch_wheels(PACKAGES, PYTHONS, cache)
    assert not wheel.exists()
    assert names(fetch_wheels(PACKAGES, PYTHONS, cache)) == names(filled[1])
    assert wheel.read_bytes() == whole


def test_a_registry_that_serves_another_file_is_refused(tmp_path):
    pins = read_lock()
    lock = tmp_path / "other.lock"
    lock.write_text(lock_text("", [pins["jinja2"]]).replace(pins["jinja2"].sums[0], "0" * 64))
    with pytest.raises(UserError, match=r"given for Jinja2==\S+ on Python 3\.11 has no sum that .*other\.lock"):
        fetch_wheels(["jinja2"], ["3.11"], tmp_path / "wheels", lock)
    assert not list((tmp_path / "wheels").rglob("*.whl"))
    assert not list((tmp_path / "wheels" / "3.11").iterdir())


def test_packages_that_cannot_be_had_are_named(tmp_path, no_registry):
    with pytest.raises(UserError, match=r"pip cannot get the box's packages for Python 3\.11: .*[Jj]inja2"):
        fetch_wheels(["jinja2"], ["3.11"], tmp_path)
    assert not list((tmp_path / "3.11").iterdir())


@pytest.mark.parametrize(("text", "found"), [("", "not at all"), ("Jinja2==0.1\n", "0.1")])
def test_a_host_that_runs_another_version_is_refused(tmp_path, text, found):
    lock = tmp_path / "a.lock"
    lock.write_text(text)
    with pytest.raises(UserError, match=rf"a\.lock pins jinja2 {found}, but \.venv has 3"):
        fetch_wheels(["jinja2"], ["3.11"], tmp_path / "wheels", lock)
    assert not (tmp_path / "wheels").exists()
