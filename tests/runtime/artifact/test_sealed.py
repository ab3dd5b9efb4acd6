"""What is loaded is what was hashed, whatever happens to the file meanwhile."""

import os

import pytest

from runtime.artifact import sealed
from runtime.artifact.hashing import file_entry
from runtime.artifact.sealed import sealed_copy
from runtime.errors import UserError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(os.urandom(3 * 2**20))
    return path


def test_a_copy_does_not_follow_its_file_and_cannot_be_changed(file):
    before = file.read_bytes()
    copy = sealed_copy(file, file_entry(file))
    file.write_bytes(b"other")
    assert copy.read_bytes() == before
    with pytest.raises(PermissionError):
        os.pwrite(int(copy.name), b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(int(copy.name), 0)


def test_no_path_comes_twice(file):
    """The loader takes a library that it has loaded from a path for the one that lies there now."""
    assert len({sealed_copy(file, file_entry(file)) for _ in range(3)}) == 3


def test_a_file_that_changed_since_it_was_listed_is_refused(file):
    entry = file_entry(file)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"library\.so is damaged: it has SHA-256"):
        sealed_copy(file, entry)


def test_a_kernel_without_the_flag_for_code(file, monkeypatch):
    create = os.memfd_create

    def older(name, flags):
        if flags & sealed.MFD_EXEC:
            raise OSError(22, "Invalid argument")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    assert sealed_copy(file, file_entry(file)).read_bytes() == file.read_bytes()


def test_a_system_that_runs_no_code_from_memory(file, monkeypatch):
    def refuse(*_):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(UserError, match="does not let a program run from memory"):
        sealed_copy(file, file_entry(file))
