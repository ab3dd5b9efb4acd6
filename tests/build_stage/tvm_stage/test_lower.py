"""From a module to a library: what is said if the linker fails."""

from types import SimpleNamespace

import pytest

from build.compiler import tvm
from build.tvm_stage import lower as module
from build.tvm_stage.target import target_spec
from export.configuration.config import BackendConfig
from runtime.errors import UserError


@pytest.fixture
def lowered(tmp_path, monkeypatch):
    """Lower an empty module with a linker that does what it is told."""

    def run(link):
        monkeypatch.setattr(module.relax, "build", lambda *_, **__: SimpleNamespace(export_library=link))
        spec = target_spec(BackendConfig(target="llvm", cpu=("x86-64-v3",)))
        module.write_library(tvm.IRModule({}), spec, tmp_path / "library.so")

    return run


def test_a_linker_that_fails_is_one_sentence(lowered):
    def full(_path, options):
        raise RuntimeError("Compilation error:\n/usr/bin/ld: final link failed: No space left on device\n")

    with pytest.raises(UserError, match=r"library\.so cannot be linked: Compilation error: .* No space left on device"):
        lowered(full)


def test_no_compiler_at_all(lowered, monkeypatch):
    monkeypatch.setattr(module.cc, "get_cc", lambda: None)
    with pytest.raises(UserError, match=r"no C\+\+ compiler was found on PATH"):
        lowered(pytest.fail)
