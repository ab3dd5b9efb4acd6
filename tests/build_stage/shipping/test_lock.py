"""The lock files: every file that may be installed is pinned by its hash, and `make lock` writes them again."""

import base64
import hashlib
import re

import pytest

from build.shipping.lock import (
    LOCK,
    Pin,
    Places,
    canonical,
    comment_of,
    fits,
    lock_again,
    lock_files,
    lock_text,
    read_lock,
    sums_to_lock,
)
from export.stage import ROOT
from runtime.doctor import GRAMMAR_PACKAGE, PACKAGES, PYTHONS, SERVER_PACKAGES, TOKENIZER_PACKAGES
from runtime.errors import UserError


@pytest.mark.parametrize("path", lock_files(), ids=lambda path: path.name)
def test_every_package_is_locked_by_hash_and_the_file_is_as_the_command_writes_it(path):
    pins = read_lock(path)
    assert pins
    assert all(pin.sums for pin in pins.values())
    assert lock_text(comment_of(path), list(pins.values())) == path.read_text()
    assert comment_of(path).startswith("# ")


def test_the_makefile_installs_nothing_without_hashes():
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert installs
    assert all("--require-hashes" in line and "--no-deps" in line for line in installs)


def test_the_boxes_packages_have_a_wheel_for_each_of_their_pythons():
    """Numpy and msgspec have one wheel a Python; a pure package has one for all."""
    pins = read_lock(LOCK)
    tokenizers = {name for names in TOKENIZER_PACKAGES.values() for name in names}
    for name in {*PACKAGES, *tokenizers, *SERVER_PACKAGES, GRAMMAR_PACKAGE, "pynacl"}:
        assert canonical(name) in pins
    assert len(pins["msgspec"].sums) >= len(PYTHONS)


@pytest.mark.parametrize(
    ("wheel", "python", "fitting"),
    [
        ("a-1-py3-none-any.whl", "3.13", True),
        ("a-1-py2.py3-none-any.whl", "3.11", True),
        ("a-1-py2-none-any.whl", "3.11", False),
        ("a-1-py312-none-any.whl", "3.11", False),
        ("a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "3.11", True),
        ("a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "3.12", False),
        ("a-1-cp38-abi3-manylinux_2_34_x86_64.whl", "3.13", True),
        ("a-1-cp313-abi3-manylinux_2_34_x86_64.whl", "3.12", False),
        ("a-1-cp313-cp313t-manylinux_2_28_x86_64.whl", "3.13", False),
        ("a-1-cp311-cp311-musllinux_1_2_x86_64.whl", "3.11", False),
        ("a-1-cp311-cp311-manylinux_2_28_aarch64.whl", "3.11", False),
        ("a-1-cp311-cp311-win_amd64.whl", "3.11", False),
        ("a-1-7build-cp311-cp311-linux_x86_64.whl", "3.11", True),
        ("a.whl", "3.11", False),
    ],
)
def test_wheels_that_pip_may_take(wheel, python, fitting):
    assert fits(wheel, python) == fitting


def test_the_source_is_locked_only_where_a_host_has_no_wheel():
    pin = Pin("a_b", "1.0", ())
    pure = {"a_b-1.0-py3-none-any.whl": {"pure"}, "a_b-1.0.tar.gz": {"source"}, "a_b-1.1-py3-none-any.whl": {"other"}}
    assert sums_to_lock(pin, pure) == ("pure",)
    only_new = {"a_b-1.0-cp312-cp312-manylinux_2_28_x86_64.whl": {"new"}, "a-b-1.0.tar.gz": {"source"}}
    assert sums_to_lock(pin, only_new) == ("new", "source")
    box_too = {f"a_b-1.0-cp3{minor}-cp3{minor}-manylinux_2_28_x86_64.whl": {f"{minor}"} for minor in (10, 11, 12, 13)}
    assert sums_to_lock(pin, box_too) == ("11", "12", "13")
    with pytest.raises(UserError, match=r"there is no file of a_b==1\.0 for Python 3\.11 where pip looks"):
        sums_to_lock(pin, {name: sums for name, sums in only_new.items() if name.endswith(".whl")})


def test_a_local_build_keeps_its_sums_where_it_is_not_served():
    pin = Pin("a", "1.0+cpu", ("known",))
    assert sums_to_lock(pin, {"a-1.0-py3-none-any.whl": {"public"}}) == ("known",)
    assert sums_to_lock(pin, {"a-1.0+cpu-cp311-cp311-linux_x86_64.whl": {"new"}}) == ("new",)


def test_a_lock_is_written_again_from_where_pip_looks(tmp_path):
    """A page of links, as a registry without the JSON form has it, and a folder of wheels."""
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("listed", "lying", "old")}
    page = tmp_path / "index" / "some-thing" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(
        f'<a href="../../files/some_thing-2.0-py3-none-any.whl#sha256={sums["listed"]}">x</a>'
        f'<a href="some_thing-1.0-py3-none-any.whl#sha256={sums["old"]}">x</a><a href="other.whl">y</a>'
    )
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some_thing-2.0-cp311-cp311-linux_x86_64.whl").write_text("lying")
    lock = tmp_path / "a.lock"
    lock.write_text("# Why.\n# How.\nSome.Thing==2.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    places = Places(((tmp_path / "index").as_uri(), (tmp_path / "absent").as_uri()), (tmp_path / "wheels",))
    assert lock_again(lock, places) == 1
    assert comment_of(lock) == "# Why.\n# How.\n"
    assert read_lock(lock) == {"some-thing": Pin("Some.Thing", "2.0", tuple(sorted([sums["listed"], sums["lying"]])))}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.lock", "index", "wheels"]


@pytest.mark.parametrize("text", ["a>=1", "--hash=sha256:" + "0" * 64, "a==1 ; python_version > '3'", "a==1 b==2"])
def test_a_line_that_pins_nothing_is_refused(tmp_path, text):
    (tmp_path / "a.lock").write_text(f"# A comment.\n{text}\n")
    with pytest.raises(UserError, match=re.escape(f"a.lock:2 is {text!r}, expected `NAME==VERSION`")):
        read_lock(tmp_path / "a.lock")


def test_a_second_pin_of_a_package_is_refused(tmp_path):
    (tmp_path / "a.lock").write_text("a_b==1\nA.b==2\n")
    with pytest.raises(UserError, match=r"a\.lock:2 pins a-b a second time"):
        read_lock(tmp_path / "a.lock")


def test_a_password_in_the_settings_of_pip_is_sent_but_never_shown(monkeypatch):
    asked = []

    def refuse(request, timeout):
        asked.append(request)
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    places = Places(("https://user:secr%40t@registry.example/simple",), ())
    with pytest.raises(UserError, match=r"https://registry\.example/simple/numpy/ cannot be read") as told:
        places.files("numpy")
    assert "secr" not in str(told.value)
    assert asked[0].get_header("Authorization") == "Basic " + base64.b64encode(b"user:secr@t").decode()
