"""The doctor sees what is wrong with a machine and says how to fix it; a stand-in gives the driver's answers."""

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import msgspec
import pytest

from runtime import doctor
from runtime.artifact.folder import Artifact
from runtime.artifact.targets import TARGETS
from runtime.doctor import examine, table
from runtime.engines import cuda_driver, examination
from runtime.engines.cuda_driver import Device, check_driver, read_driver
from runtime.errors import UserError
from tests.helpers.drivers import stub_driver


@pytest.fixture
def artifact(compile_case):
    return compile_case("windowed").artifact


def wrong(folder):
    return {finding.check: finding for finding in examine(folder) if finding.remedy}


def test_a_sound_machine(artifact, capsys):
    assert doctor.main([str(artifact)]) == 0
    text = capsys.readouterr().out
    assert "This machine can run it." in text
    assert doctor.main([str(artifact), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    packages = ["numpy", "msgspec", "apache-tvm-ffi", "artifact", "apache-tvm-ffi version", "tokenizers", "jinja2"]
    packages += ["starlette", "uvicorn", "prometheus-client"]
    assert [row["check"] for row in rows] == [
        "python",
        "C library",
        *packages,
        "TVM's runtime",
        "CPU",
        "disk",
        "memory",
    ]


@pytest.mark.parametrize(
    ("change", "check", "remedy"),
    [
        (lambda m: m.setattr(doctor, "PYTHONS", ("3.98", "3.99")), "python", "run it with Python 3.98 to 3.99"),
        (lambda m: m.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2.17")), "C library", "use a newer Linux"),
        (lambda m: m.setattr(doctor.platform, "libc_ver", lambda: ("", "")), "C library", "use a newer Linux"),
        (lambda m: m.setattr(doctor, "SPARE_DISK", 1e18), "disk", "free some space"),
        (lambda m: m.setattr("runtime.engines.loaded_artifact.PROCESS_BYTES", 10**18), "memory", "free memory"),
        (
            lambda m: m.setattr("runtime.artifact.cpu.machine_features", lambda: frozenset({"lm"})),
            "CPU",
            "as the message says",
        ),
        (
            lambda m: m.setattr("runtime.engines.tvm_runtime.find_library", missing_library),
            "TVM's runtime",
            "install.sh",
        ),
    ],
    ids=["python", "old glibc", "no glibc", "disk", "memory", "cpu", "runtime"],
)
def test_what_is_wrong_is_named(artifact, monkeypatch, change, check, remedy):
    monkeypatch.setattr("runtime.engines.tvm_runtime.import_ffi", without_runtime)
    change(monkeypatch)
    found = wrong(artifact)
    assert check in found
    assert remedy in found[check].remedy
    assert f"{check}: {found[check].found}. What to do: {found[check].remedy}" in table(list(found.values()))


def without_runtime():
    """Simulate a process in which only `tvm_ffi` is loaded."""
    import tvm_ffi

    class Ffi:
        @staticmethod
        def get_global_func(name, allow_missing):
            return None

    assert tvm_ffi
    return Ffi


def missing_library(_name):
    raise UserError("libtvm_runtime.so was not found")


def test_missing_packages(artifact, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    assert {"numpy", "msgspec", "apache-tvm-ffi", "tokenizers", "jinja2"} <= wrong(artifact).keys()


def test_a_package_that_cannot_be_imported(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    found = wrong(artifact)
    assert found.keys() == {"TVM's runtime"}
    assert "install.sh" in found["TVM's runtime"].remedy


def test_another_version_of_the_ffi(artifact, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "9.9")
    assert wrong(artifact).keys() == {"apache-tvm-ffi version"}


def test_a_damaged_artifact(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    found = wrong(tmp_path / "copy")
    assert found.keys() == {"artifact"}
    assert "tokenizer.json is missing" in found["artifact"].found
    assert doctor.main([str(tmp_path / "absent")]) == 2


def cuda_findings(artifact, archs=("sm_80", "sm_90a")):
    manifest = Artifact.open(artifact).manifest
    target = msgspec.structs.replace(manifest.target, kind="cuda", arch=archs)
    return list(examination.examine_cuda(msgspec.structs.replace(manifest, target=target)))


def test_a_gpu(artifact, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "DRIVER", stub_driver(tmp_path))
    findings = cuda_findings(artifact)
    assert not any(finding.remedy for finding in findings)
    assert [Path(finding.found).name for finding in findings[:2]] == list(TARGETS["cuda"].libraries)
    assert [finding.found for finding in findings[2:]] == ["CUDA 13.0", "NVIDIA H200, sm_90", "150.0 GB"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": 100}, r"reports error 100 \(no device\)"),
        ({"version": 12080}, "supports CUDA 12.8, expected 13.0 or newer; install driver R580"),
        ({"count": 0}, "found no GPU"),
        (
            {"major": 7, "minor": 5},
            r"is sm_75, but the artifact has machine code for sm_80, sm_90a; compile it with backend.arch: \[sm_75\]",
        ),
        ({"major": 10}, "is sm_100, but"),
    ],
)
def test_a_driver_or_a_gpu_that_does_not_fit(artifact, monkeypatch, tmp_path, changes, message):
    monkeypatch.setattr(cuda_driver, "DRIVER", stub_driver(tmp_path, **changes))
    with pytest.raises(UserError, match=message):
        check_driver(read_driver(), ("sm_80", "sm_90a"))
    assert [finding.check for finding in cuda_findings(artifact) if finding.remedy] == ["CUDA"]


def test_too_small_a_gpu(artifact, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "DRIVER", stub_driver(tmp_path, memory=1000))
    assert [finding.check for finding in cuda_findings(artifact) if finding.remedy] == ["GPU memory"]


def test_no_driver_at_all(monkeypatch):
    monkeypatch.setattr(cuda_driver, "DRIVER", "libcuda-absent.so.1")
    with pytest.raises(UserError, match=r"no CUDA driver found: libcuda-absent\.so\.1 cannot be loaded"):
        read_driver()


NEWER = [((10, 0), "sm_100", True), ((10, 3), "sm_100a", False), ((12, 0), "sm_100", False)]


@pytest.mark.parametrize(
    ("capability", "arch", "runs"),
    [
        ((8, 0), "sm_80", True),
        ((8, 9), "sm_80", True),
        ((8, 0), "sm_89", False),
        ((9, 0), "sm_80", False),
        ((9, 0), "sm_90a", True),
        *NEWER,
    ],
)
def test_which_code_runs_where(capability, arch, runs):
    """CUDA's rule.

    Machine code runs on its own generation, from its version on; code for an `a` architecture runs on exactly that one.
    """
    assert Device("", capability, 0).runs(arch) == runs
