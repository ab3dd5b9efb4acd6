"""`install.sh` refuses what was changed, added, linked or signed by somebody else, before it runs anything.

The folder is a small one in the shipped form. Its Python is a script that writes down how it was called;
`test_ship.py` installs with a real one.
"""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest

from build.shipping.archive import SUMS_FILE, SUMS_SIGNATURE, Member, with_sums
from build.shipping.keys import make_keys
from build.shipping.ship import INSTALLER
from export.stage import ROOT
from tests.helpers.pages import blocks

TOOLS = ("sh", "sha256sum", "find", "awk", "grep", "head", "tail", "sed", "base64", "mktemp", "rm", "dirname")
PYTHON = """#!/bin/sh
echo "PIP_CONFIG_FILE=${PIP_CONFIG_FILE-} RUNTIME_PUBLIC_KEY=${RUNTIME_PUBLIC_KEY-} $*" >>"$LOG"
case "$*" in
*sys.version_info*) echo 3.11 ;;
*venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*pip*) [ -z "${PIP_FAILS-}" ] || { echo "WARNING: first"; echo "ERROR: disk full" >&2; exit 1; } ;;
esac
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def box(keys, tmp_path):
    """A folder as it is shipped, signed."""
    folder = tmp_path / "box"
    members = {
        "install.sh": INSTALLER.read_text().replace("@PYTHONS@", "3.11 3.12"),
        "requirements.txt": "",
        "runtime/generate.py": "print('hello')\n",
        "artifact/manifest.json": "{}",
    }
    made = {path: Member(text.encode(), "x") for path, text in members.items()}
    for path, member in with_sums(made, keys[0]).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(member.source)
    (folder / "install.sh").chmod(0o755)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return folder


def run(box, *options, **environment):
    return subprocess.run(
        [box / "install.sh", *options, box.parent / "python"],
        env={"PATH": "/usr/bin:/bin", "LOG": str(box.parent / "log"), **environment},
        cwd=box.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def calls(box):
    log = box.parent / "log"
    return log.read_text().splitlines() if log.exists() else []


def assert_refused(box, result, words):
    """Status 2, one sentence, and nothing was run."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert calls(box) == []
    assert not (box / ".venv").is_dir()


def tools_without(folder, *missing):
    """A folder for PATH with the tools that the installer may use."""
    folder.mkdir()
    for tool in {*TOOLS, "basename", "openssl"} - set(missing):
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


@pytest.mark.parametrize("form", ["none", "two words", "one word", "relative"])
def test_a_whole_folder_installs(box, keys, form):
    options = {
        "none": [],
        "two words": ["--public-key", keys[1]],
        "one word": [f"--public-key={keys[1]}"],
        "relative": ["--public-key", os.path.relpath(keys[1], box.parent)],
    }[form]
    for _ in range(2):  # the second time with .venv, and with the caches that Python has written
        result = run(box, *options)
        assert (result.returncode, result.stderr) == (0, "")
        (box / "runtime" / "__pycache__").mkdir(exist_ok=True)
    assert calls(box)[-1].endswith(" -E -m runtime.doctor artifact")
    given = calls(box)[-1].split("RUNTIME_PUBLIC_KEY=")[1].split(" ")[0]
    assert bool(given) == (form != "none")
    assert not given or os.path.samefile(given, keys[1])


@pytest.mark.parametrize("signed", [False, True])
def test_for_another_machine_it_installs_and_examines_nothing(box, keys, signed):
    options = ["--public-key", keys[1]] if signed else []
    result = run(box, *options, "--no-doctor")
    assert (result.returncode, result.stderr) == (0, "")
    assert any(" -I -m pip --isolated install " in call for call in calls(box))
    assert not any("doctor" in call for call in calls(box))


def test_neither_pips_nor_pythons_settings_have_a_say(box):
    result = run(box, PIP_TARGET="/elsewhere", PYTHONPATH=str(box), PIP_CONFIG_FILE="/etc/evil.conf")
    assert result.returncode == 0
    (pip,) = (call for call in calls(box) if " pip " in call)
    assert pip.startswith("PIP_CONFIG_FILE=/dev/null ")
    assert " -I -m pip --isolated install " in pip
    assert {"--no-index", "--no-deps", "--require-hashes"} <= set(pip.split())
    installing = [" -I -" in call for call in calls(box)]
    assert installing == sorted(installing, reverse=True)
    ours = calls(box)[sum(installing) :]  # of the runtime's own modules, which are files of this folder
    assert ours
    assert all(" -E -" in call for call in ours)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["requirements.txt", "runtime/generate.py", "artifact/manifest.json"])
def test_a_changed_or_missing_file_is_refused_and_named(box, keys, name, signed):
    options = ["--public-key", keys[1]] if signed else []
    (box / name).write_text("changed")
    assert_refused(box, run(box, *options), f"{name} is missing or does not have its sum in SHA256SUMS")
    (box / name).unlink()
    assert_refused(box, run(box, *options), f"{name} is missing or does not have its sum in SHA256SUMS")


def test_a_file_and_its_sum_changed_together_are_refused_with_a_key(box, keys):
    old = hashlib.sha256((box / "runtime/generate.py").read_bytes()).hexdigest()
    (box / "runtime/generate.py").write_text("import evil\n")
    new = hashlib.sha256(b"import evil\n").hexdigest()
    (box / SUMS_FILE).write_text((box / SUMS_FILE).read_text().replace(old, new))
    assert_refused(box, run(box, "--public-key", keys[1]), "was changed after it was signed")
    assert run(box).returncode == 0  # sums alone find damage, not malice


@pytest.mark.parametrize("name", ["pip.py", "runtime/evil.so", "runtime/-x", "wheels/a.whl", "a b", "x\n./runtime/z"])
def test_a_file_that_is_not_listed_is_refused(box, name):
    (box / name).parent.mkdir(parents=True, exist_ok=True)
    (box / name).write_text("")
    assert_refused(box, run(box), f"{name.splitlines()[0]} is not listed in SHA256SUMS")


@pytest.mark.parametrize("name", ["runtime/generate.py", "runtime/other.py", ".venv", "artifact"])
def test_a_link_is_refused(box, name):
    """Even to a file with the right sum: what it leads to can change after the check."""
    path = box / name
    if path.exists():
        path.rename(box.parent / "moved")
    path.symlink_to(box.parent / "moved")
    assert_refused(box, run(box), f"{name} is neither a file nor a folder")


def test_planted_caches_of_code_are_removed(box):
    """A `.pyc` file would be run in place of the source whose sum was checked."""
    planted = box / "runtime" / "__pycache__" / "generate.cpython-311.pyc"
    planted.parent.mkdir()
    planted.write_text("evil")
    assert run(box).returncode == 0
    assert not planted.parent.exists()


def test_another_key_and_a_missing_signature_are_refused(box, keys, tmp_path):
    _, other = make_keys(tmp_path / "other")
    assert_refused(box, run(box, "--public-key", other), "or was signed by another key than")
    (box / SUMS_SIGNATURE).unlink()
    assert_refused(box, run(box, "--public-key", keys[1]), "is not signed, but a signature by")


@pytest.mark.parametrize("text", ["", "ed25519-signature", "ed25519-signature AAAA\n", "ed25519-signature ***\n", "\0"])
def test_a_broken_signature_is_refused(box, keys, text):
    (box / SUMS_SIGNATURE).write_text(text)
    assert_refused(box, run(box, "--public-key", keys[1]), "was changed after it was signed")


@pytest.mark.parametrize(
    "text", ["", "\n", "ed25519-public-key", "ed25519-public-key AAAA", "private", "two words a b"]
)
def test_a_file_that_is_no_public_key_is_refused(box, keys, text, tmp_path):
    key = tmp_path / "a.pub"
    key.write_text(keys[0].read_text() if text == "private" else text)
    result = run(box, "--public-key", key)
    assert_refused(box, result, "a.pub cannot be read" if text == "" else "a.pub holds no ed25519-public-key")
    assert keys[0].read_text().split()[1] not in result.stderr


def test_a_missing_key_is_refused(box, tmp_path):
    assert_refused(box, run(box, "--public-key", tmp_path / "absent"), "absent cannot be read")


def test_the_check_by_hand_in_the_documentation_holds(box, keys, tmp_path):
    (text,) = (block for block in blocks(ROOT / "docs" / "artifact.md", "bash") if "pkeyutl" in block)
    text = text.replace("/tmp/", f"{tmp_path}/").replace("/etc/keys/signing.pub", str(keys[1]))

    def check():
        return subprocess.run(["bash", "-c", text], cwd=box, capture_output=True, text=True, check=False).stdout

    assert check().endswith("\nsound\n")
    whole = (box / "runtime/generate.py").read_bytes()
    (box / "runtime/generate.py").write_text("changed")
    assert "sound" not in check()
    (box / "runtime/generate.py").write_bytes(whole)
    (box / SUMS_FILE).write_text((box / SUMS_FILE).read_text().replace("a", "b", 1))
    assert "sound" not in check()


def test_without_openssl_a_key_is_refused_and_no_key_is_not(box, keys, tmp_path):
    tools = tools_without(tmp_path / "tools", "openssl")
    assert_refused(box, run(box, "--public-key", keys[1], PATH=tools), "there is no openssl here")
    assert "mkdir" in run(box, PATH=tools).stderr or calls(box)  # it went on to Python


@pytest.fixture
def old_openssl(tmp_path):
    """A PATH whose openssl is as that of 1.1.1, which has the algorithm, but no command for it."""
    path = tools_without(tmp_path / "tools", "openssl") + ":/usr/bin:/bin"
    (tmp_path / "tools" / "openssl").write_text("#!/bin/sh\necho OpenSSL 1.1.1w\n")
    (tmp_path / "tools" / "openssl").chmod(0o755)
    return path


def test_an_old_openssl_checks_by_its_library(box, keys, old_openssl, tmp_path):
    python = box.parent / "python"
    checks = f'case "$*" in "-I - "*) exec {sys.executable} "$@" ;; esac\n'  # before it writes down the call
    python.write_text(python.read_text().replace("echo", f"{checks}echo", 1))
    good = run(box, "--public-key", keys[1], PATH=old_openssl)
    assert (good.returncode, good.stderr) == (0, "")
    shutil.rmtree(box / ".venv")
    (box.parent / "log").unlink()
    _, other = make_keys(tmp_path / "other")
    assert_refused(box, run(box, "--public-key", other, PATH=old_openssl), "or was signed by another key than")
    (box / SUMS_FILE).write_text((box / SUMS_FILE).read_text() + "0" * 64 + "  x\n")
    assert_refused(box, run(box, "--public-key", keys[1], PATH=old_openssl), "was changed after it was signed")
    (box / SUMS_SIGNATURE).write_text("")
    assert_refused(box, run(box, "--public-key", keys[1], PATH=old_openssl), "was changed after it was signed")


def test_an_openssl_without_a_library_is_refused(box, keys, old_openssl):
    (box.parent / "python").write_text("#!/bin/sh\nexit 3\n")
    assert_refused(
        box,
        run(box, "--public-key", keys[1], PATH=old_openssl),
        "OpenSSL 1.1.1w cannot check an Ed25519 signature here, expected OpenSSL 1.1.1 or newer",
    )


@pytest.mark.parametrize("tool", ["sha256sum", "awk", "base64"])
def test_without_a_tool_of_the_check_nothing_is_installed(box, keys, tool, tmp_path):
    tools = tools_without(tmp_path / "tools", tool)
    assert_refused(box, run(box, "--public-key", keys[1], PATH=tools), f"there is no {tool} here")


def test_caches_that_cannot_be_removed_are_refused(box, tmp_path):
    tools = tools_without(tmp_path / "tools", "rm")  # root may remove anything
    (tmp_path / "tools" / "rm").symlink_to("/bin/false")
    (box / "runtime" / "__pycache__").mkdir()
    assert_refused(box, run(box, PATH=tools), "__pycache__ in ")


def test_missing_and_malformed_sums_are_refused(box):
    whole = (box / SUMS_FILE).read_text()
    (box / "runtime/evil.py").write_text("")
    (box / SUMS_FILE).write_text(whole + "0" * 63 + "   runtime/evil.py\n")  # sha256sum passes over such a line
    assert_refused(box, run(box), "SHA256SUMS holds a line that is no sum and name")
    (box / SUMS_FILE).unlink()
    assert_refused(box, run(box), "SHA256SUMS is missing")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--publickey", "x"], "--publickey is not known here; usage: "),
        (["--no-doctor", "--publickey", "x"], "--publickey is not known here; usage: "),
        (["--public-key", ""], "--public-key names no file; usage: "),
        (["--public-key="], "--public-key names no file; usage: "),
        (["a", "b"], "there are 3 arguments, expected at most the name of a Python; usage: "),
    ],
)
def test_other_arguments_are_refused(box, options, words):
    assert_refused(box, run(box, *options), words)


def test_another_python_is_refused_in_a_sentence(box):
    python = box.parent / "python"
    python.write_text(PYTHON.replace("echo 3.11", "echo 3.99"))
    result = run(box)
    assert result.returncode == 2
    assert "is Python 3.99, and the packages here are for 3.11 3.12" in result.stderr
    python.write_text("#!/bin/sh\nexit 1\n")
    result = run(box)
    assert result.returncode == 2
    assert "is no Python 3; name another" in result.stderr
    python.unlink()
    result = run(box)
    assert result.returncode == 2
    assert "there is no " in result.stderr


def test_a_failure_of_pip_is_one_sentence(box):
    result = run(box, PIP_FAILS="1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: pip could not install the packages in ")
    assert "(ERROR: disk full)" in result.stderr
    assert result.stderr.count("\n") == 1


def test_nothing_is_left_in_the_folder_for_temporary_files(box, keys, tmp_path):
    (tmp_path / "tmp").mkdir()
    assert run(box, "--public-key", keys[1], TMPDIR=str(tmp_path / "tmp")).returncode == 0
    (box / SUMS_SIGNATURE).write_text("")
    assert run(box, "--public-key", keys[1], TMPDIR=str(tmp_path / "tmp")).returncode == 2
    assert list((tmp_path / "tmp").iterdir()) == []
