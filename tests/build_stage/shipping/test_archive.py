"""The archive appears complete or not at all, and never holds a file that changed meanwhile."""

import hashlib
import os
import subprocess

import pytest

from build.shipping.archive import SUMS_FILE, SUMS_SIGNATURE, Member, with_sums, write_archive
from build.shipping.keys import make_keys
from runtime.errors import UserError
from tests.helpers.shipped import unpack


def test_the_sums_cover_every_member_in_the_form_of_sha256sum(tmp_path):
    (tmp_path / "a").write_text("file")
    private, _ = make_keys(tmp_path / "keys")
    members = with_sums({"z/a": Member(tmp_path / "a", "x"), "b": Member(b"bytes", "x")}, private)
    assert list(members) == [SUMS_FILE, SUMS_SIGNATURE, "b", "z/a"]
    write_archive(members, "name", tmp_path / "x.tar.zst")
    box = unpack(tmp_path / "x.tar.zst", tmp_path / "box")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE], cwd=box, check=True)
    assert {line[66:] for line in (box / SUMS_FILE).read_text().splitlines()} == {"b", "z/a"}


def test_without_a_key_there_is_no_signature():
    assert list(with_sums({"b": Member(b"bytes", "x")}, None)) == [SUMS_FILE, "b"]


@pytest.mark.parametrize("change", ["content", "known sum", "shorter", "longer"])
def test_a_file_that_changes_meanwhile_gives_no_archive(tmp_path, change):
    source, target = tmp_path / "source", tmp_path / "x.tar.zst"
    source.write_text("before")
    target.write_text("the archive before")
    known = hashlib.sha256(b"another").hexdigest() if change == "known sum" else None
    members = with_sums({"a": Member(source, "x", known_sum=known)}, None)
    source.write_text(
        {"content": "behind", "known sum": "before", "shorter": "", "longer": "before and behind"}[change]
    )
    with pytest.raises(UserError, match=r"source changed while it was shipped, expected SHA-256 [0-9a-f]{64}; ship it"):
        write_archive(members, "name", target)
    assert target.read_text() == "the archive before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x.tar.zst"]


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = [".x.tar.zst.tmp", f".x.tar.zst.{ended.pid}.tmp", f".x.tar.zst.{os.getpid()}.tmp"]
    kept = [f".x.tar.zst.{os.getppid()}.tmp", ".xy.tar.zst.tmp", ".x.tar.zst.mine.tmp", "x.tar.zst.tmp"]
    for name in [*stale, *kept]:
        (tmp_path / name).write_text("")
    write_archive({"b": Member(b"bytes", "x")}, "name", tmp_path / "x.tar.zst")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "x.tar.zst"])
