"""The steps of `runtime.gpucheck` and its report, whatever becomes of a step; a stand-in measures.

The stand-in is a script in the place of `runtime.gpu_check.measurement`. It logs its calls, and says what a GPU would.
"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import msgspec
import pytest

from export.stage import ROOT
from runtime import gpucheck
from runtime.artifact.folder import Artifact
from runtime.artifact.hashing import file_entry
from runtime.artifact.manifest import KernelCall, TargetSpec, to_json
from runtime.errors import UserError
from runtime.gpu_check import check_run, process_group, sanitizer, torch_process
from tests.helpers.processes import assert_gone
from tests.helpers.shipped import executable

KERNELS = 4
STAND_IN = """
import json, os, sys, time
part, folder = sys.argv[1], os.path.basename(sys.argv[2])
first = int(sys.argv[-1]) if part == "kernels" else 0
print(part, folder, first, os.getpid(), file=open({log!r}, "a"))
def tell(name, finding):
    print(json.dumps({{name: finding}}), flush=True)
def gpu():
    tell("gpu", {{"name": "a GPU", "driver": "580", "copy_gb_s": 4000.0}})
def kernel(i, error=0.5):
    row = {{"label": "4 x 64", "graphs": "step_1", "error": error, "bytes": 10**7, "flops": 10**8, "cold": True}}
    tell("kernel", {{"kernel": f"kernel_{{i}}", "seconds": 1e-5, **row}})
def kernels():
    for i in range(first, {kernels}):
        kernel(i)
def model():
    tell("checks", [{{"check": "prefill", "found": "0 apart", "expected": "less", "ok": True}}])
    decode = [{{"context": 64, "step_s": 0.005, "tok_s": 200, "bytes_per_step": 10**10, "gb_s": 2000}}]
    tell("speeds", {{"prefill": [], "decode": decode, "skipped": ["skipped: a prompt of 512 tokens"]}})
def launches():
    tell("launched", {kernels})
"""
RIVAL = """
basename "$1" >>rivals
case "$1" in
*/torch_script.py) echo '{"peak_tflop_s": 700.0, "seconds": {"small decode": 0.004}}' ;;
*) echo '{"ttft": {"128": 0.02}, "decode": {"64": 0.01}, "graph": true}' ;;
esac
"""
SANITIZER = 'shift 2; "$@"; echo "========= ERROR SUMMARY: 0 errors"'


@pytest.fixture
def box(compile_case, tmp_path, monkeypatch):
    """A folder with two checks, and stand-ins for all that is measured with; the current folder."""
    manifest = Artifact.open(compile_case("windowed").artifact).manifest
    call = KernelCall(kernel="", op="rms_norm", arguments=([1, 4], 64), parameters=(), calls={}, bytes=0, flops=0)
    calls = tuple(msgspec.structs.replace(call, kernel=f"kernel_{i}") for i in range(KERNELS))
    target = TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",))
    for name, weights in (("small", manifest.weights[:1]), ("large", manifest.weights)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "library.so").write_bytes(b"")
        changed = {"name": name, "calls": calls, "target": target, "weights": weights}
        files = (file_entry(folder / "library.so"),)
        (folder / "manifest.json").write_bytes(to_json(msgspec.structs.replace(manifest, files=files, **changed)))
    rival = executable(tmp_path / "python", RIVAL)
    monkeypatch.setattr(torch_process, "pythons", lambda: [str(rival)])
    tools = executable(tmp_path / "compute-sanitizer", SANITIZER)
    monkeypatch.setattr(check_run, "find_sanitizer", lambda: str(tools))
    monkeypatch.setattr(check_run, "MEASUREMENT", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(box, changes=""):
    """Write the stand-in, some of whose functions are changed."""
    text = STAND_IN.format(log=str(box / "log"), kernels=KERNELS) + changes + "\nglobals()[part]()\n"
    (box / "stand_in.py").write_text(text)


def log(box):
    """The calls of the stand-in: part, folder, first kernel, process."""
    return [line.split() for line in (box / "log").read_text().splitlines()]


def report(folder):
    return json.loads((folder / "gpucheck.json").read_text())


def measured(folder):
    """The numbers of the kernels that a report has, by model."""
    return {name: [row["kernel"][-1] for row in model["kernels"]] for name, model in report(folder)["models"].items()}


def unmeasured(folder):
    """The reasons by what was not measured."""
    return {f"{row['of']} {row['what']}": row["why"] for row in report(folder)["not_measured"]}


def test_all_kernels_come_first_and_then_whole_models_the_peers_and_the_sanitizer(box, capsys):
    stand_in(box)
    assert gpucheck.main(["large", "small"]) == 0
    parts = ("gpu small", "kernels small", "kernels large", "model small", "model large", *["launches small"] * 4)
    assert [f"{part} {folder}" for part, folder, _, _ in log(box)] == list(parts)
    assert measured(box) == {"small": list("0123"), "large": list("0123")}
    found = report(box)
    assert (found["ok"], found["gpu"]["driver"], found["not_measured"]) == (True, "580", [])
    assert (found["torch"]["peak_tflop_s"], set(found["transformers"])) == (700.0, {"small", "large"})
    assert (box / "rivals").read_text().split() == ["torch_script.py", "transformers_script.py"]
    assert [result["tool"] for result in found["sanitizer"]] == list(sanitizer.TOOLS)
    tables = (box / "gpucheck.md").read_text()
    assert tables.startswith("a GPU with driver 580, on 20")
    for row in (
        "| small | decode, context 64 | 200.0 tok/s | 5.00 ms | 50% of copy, 1.25 of the time of torch's products "
        "alone, 0.50 of the time of transformers' graph |",
        "| small | prefill | 0 apart | less | yes |",
        "| memcheck | small | 4 | 0 errors | yes |",
        "| small | speed | skipped: a prompt of 512 tokens |",
        "| 0.5 | 10.0 | 1,000 | 10.00 | 25% of copy | kernel_3 | 4 x 64 | step_1 |",
    ):
        assert row in tables
    assert tables.count("transformers' first token after 128") == 1  # both folders hold the same model
    assert "kernel_3" in capsys.readouterr().out


def test_one_half_alone(box, capsys):
    stand_in(box)
    assert gpucheck.main(["small", "--kernels-only", "--json"]) == 0
    assert [part for part, *_ in log(box)] == ["gpu", "kernels", *["launches"] * 4]
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["speeds"], len(found["kernels"]), found["copy_gb_s"]) == (True, None, KERNELS, 4000.0)
    (box / "log").unlink()
    (box / "reports").mkdir()
    assert gpucheck.main(["small", "large", "--models-only", "--json", "--report", "reports"]) == 0
    assert [part for part, *_ in log(box)] == ["gpu", "model", "model"]
    lines = capsys.readouterr().out.splitlines()
    assert [(json.loads(line)["name"], json.loads(line)["kernels"]) for line in lines] == [("small", []), ("large", [])]
    assert report(box / "reports")["not_measured"] == []


def test_what_the_time_does_not_allow_is_listed(box, capsys, monkeypatch):
    stand_in(box, "def kernels():\n    kernel(0)\n    kernel(1)\n    time.sleep(60)\n")

    def monotonic():
        """A clock that is ten minutes ahead as soon as two kernels are in the report."""
        two = (box / "gpucheck.json").exists() and len(measured(box)["small"]) == 2
        return time.monotonic() + 600 * two

    for module in (check_run, process_group):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    with pytest.raises(UserError, match=r"^time was up before 17 parts were measured, which gpucheck\.md lists"):
        gpucheck.main(["small", "large"])
    assert measured(box) == {"small": ["0", "1"], "large": []}
    missing = unmeasured(box)
    assert set(missing.values()) == {"time was up"}
    assert {"small kernel_2", "large kernel_0", "large checks", "torch matrix products"} <= missing.keys()
    assert {"transformers small", "compute-sanitizer racecheck"} <= missing.keys()
    assert "| small | kernel_2, kernel_3 | time was up |" in (box / "gpucheck.md").read_text()
    assert "| small | kernel_2, kernel_3 | time was up |" in capsys.readouterr().out
    assert_gone(int(pid) for *_, pid in log(box))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("sys.exit('no memory')", "it ended with status 1: no memory"),
        ("return", "it ended without a result"),
        ("time.sleep(60)", "it said nothing for 2 s"),
    ],
    ids=["fails", "ends", "hangs"],
)
def test_kernels_behind_one_that_is_lost_are_measured(box, monkeypatch, fault, why):
    monkeypatch.setattr(check_run, "KERNEL_SECONDS", 2)
    stand_in(
        box,
        f"def kernels():\n    for i in range(first, 4):\n        if i == 2:\n            {fault}\n        kernel(i)\n",
    )
    with pytest.raises(UserError, match="small: something is wrong on a GPU"):
        gpucheck.main(["small", "--kernels-only"])
    assert measured(box) == {"small": ["0", "1", "3"]}
    assert unmeasured(box) == {"small kernel_2": f"4 x 64: {why}"}
    assert_gone(int(pid) for *_, pid in log(box))


def test_a_process_that_fails_behind_its_last_kernel_has_measured_them_all(box):
    stand_in(box, "def kernels():\n    for i in range(4): kernel(i)\n    sys.exit(1)\n")
    assert gpucheck.main(["small", "--kernels-only"]) == 0
    assert (measured(box), unmeasured(box)) == ({"small": list("0123")}, {})


def test_a_folder_whose_kernels_all_fail_is_given_up(box):
    stand_in(box, "def kernels():\n    sys.exit(1)\n")
    with pytest.raises(UserError, match="small: something is wrong"):
        gpucheck.main(["small", "--kernels-only"])
    assert [first for part, _, first, _ in log(box) if part == "kernels"] == ["0", "1", "2"]
    assert unmeasured(box)["small kernel_3"] == "not tried after 3 kernels that failed"


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ("def kernels():\n    kernel(0, 2.0)\n    for i in (1, 2, 3): kernel(i)\n", {}),
        ("def kernels():\n    kernel(0, float('inf'))\n    for i in (1, 2, 3): kernel(i)\n", {}),
        (
            "def model():\n    tell('checks', [{'check': 'prefill', 'found': '9', 'expected': '0', 'ok': False}])\n",
            {"small speeds": "the checks found something wrong"},
        ),
        (
            "def model():\n    sys.exit('error: the GPU is full')\n",
            {"small checks": "the GPU is full", "small speeds": "the GPU is full"},
        ),
    ],
    ids=["error", "infinite error", "check", "model"],
)
def test_what_is_wrong_is_told_and_does_not_end_the_run(box, change, missing):
    stand_in(box, change)
    with pytest.raises(UserError, match="small: something is wrong on a GPU"):
        gpucheck.main(["small"])
    found = report(box)
    assert (found["ok"], unmeasured(box), len(found["sanitizer"])) == (False, missing, len(sanitizer.TOOLS))
    assert "WRONG" in (box / "gpucheck.md").read_text()


def test_what_is_not_installed_is_no_fault(box, monkeypatch):
    stand_in(box)
    executable(box / "python", "echo asked >>rivals; exit 1")
    monkeypatch.setattr(check_run, "find_sanitizer", lambda: None)
    assert gpucheck.main(["small", "large"]) == 0
    assert (box / "rivals").read_text().split() == ["asked"] * 2
    missing = unmeasured(box)
    assert len(missing) == 3 + len(sanitizer.TOOLS)
    assert missing["compute-sanitizer memcheck"] == "it is not installed"
    assert missing["transformers small"] == f"{box}/python: it ended with status 1"


def test_without_a_gpu_there_is_its_sentence(box, capsys):
    stand_in(box, "def gpu():\n    sys.exit('error: no CUDA driver found')\n")
    with pytest.raises(UserError, match=r"^the GPU cannot be measured: no CUDA driver found$"):
        gpucheck.main(["small"])
    assert set(unmeasured(box).values()) == {"no CUDA driver found"}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(box, minutes):
    with pytest.raises(UserError, match=rf"--minutes is {minutes}, expected more than 0"):
        gpucheck.main(["small", "--minutes", minutes])
    assert not (box / "log").exists()


def test_what_was_measured_is_printed_where_the_report_cannot_be_written(box, capsys):
    """As on a full disk, here without its folder."""
    stand_in(box, "import shutil\ndef kernels():\n    shutil.rmtree('reports')\n    kernel(0)\n    time.sleep(60)\n")
    (box / "reports").mkdir()
    with pytest.raises(FileNotFoundError):
        gpucheck.main(["small", "--kernels-only", "--report", "reports"])
    assert "| small | kernel_1, kernel_2, kernel_3 | interrupted |" in capsys.readouterr().out
    assert_gone(int(pid) for *_, pid in log(box))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_end_from_outside_leaves_the_report_and_no_process(box, number):
    stand_in(box, "def kernels():\n    kernel(0)\n    time.sleep(60)\n")
    code = (
        "import runpy; from runtime.gpu_check import check_run; "
        f"check_run.MEASUREMENT = {check_run.MEASUREMENT}; runpy.run_module('runtime.gpucheck', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "small"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 30
        while not (box / "gpucheck.json").exists() or not measured(box)["small"]:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
        said = process.stdout.read()
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert measured(box) == {"small": ["0"]}
    assert unmeasured(box)["small kernel_1"] == ("not yet" if killed else "interrupted")
    assert ("| small | kernel_1, kernel_2, kernel_3, checks, speeds | interrupted |" in said) == (not killed)
    assert_gone(int(pid) for *_, pid in log(box))
