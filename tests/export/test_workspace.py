"""Results on disk: complete or not at all, checked before they are used, and nobody else's files touched."""

import os
import subprocess
import sys
import threading

import pytest

from export.peak_memory import PEAK_FILE, noted_peak
from export.stage import ROOT
from export.workspace import (
    CONTENTS_FILE,
    TAG_FILE,
    claim,
    growing_stage,
    is_whole,
    locked,
    made_whole,
    remove_stage,
    run_stage,
    seal,
    stage_folder,
)
from runtime.errors import UserError

KEY = "0123456789abcdef0123"


def write_result(folder):
    (folder / "result").write_text("made")


def test_a_stage_runs_once(tmp_path):
    runs = []

    def fill(folder):
        runs.append(folder)
        (folder / "result").write_text("made")

    folder = run_stage(tmp_path, "graphs", "k1", fill)
    assert folder == stage_folder(tmp_path, "graphs", "k1") == run_stage(tmp_path, "graphs", "k1", fill)
    assert (folder / "result").read_text() == "made"
    assert len(runs) == 1
    assert runs[0] != folder  # filled elsewhere, then renamed


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "graphs", "k1", fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leftover", ["graphs-k1.tmp", "graphs-k0.tmp", "graphs-k0"])
def test_what_an_earlier_run_left_is_in_nobodys_way(tmp_path, leftover):
    """A killed run leaves its temporary folder, and results under other keys are stale."""
    made_whole(tmp_path / leftover, write_result)
    made_whole(tmp_path / "library-k0", write_result)
    folder = run_stage(tmp_path, "graphs", "k1", write_result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs-k1", "library-k0"]
    assert sorted(path.name for path in folder.iterdir()) == [CONTENTS_FILE, "result"]


def test_a_stage_that_grows_keeps_what_is_sealed(tmp_path):
    growing_stage(tmp_path, "layers", "k0")
    folder = growing_stage(tmp_path, "layers", "k1")
    (folder / "first").write_text("made")
    seal(folder / "first.contents", [folder / "first"])
    assert growing_stage(tmp_path, "layers", "k1") == folder
    assert list(tmp_path.iterdir()) == [folder]
    assert is_whole(folder, "first.contents")
    assert not is_whole(folder)
    remove_stage(tmp_path, "layers")
    assert list(tmp_path.iterdir()) == []


def test_what_others_left_stays(tmp_path):
    """Whatever its name is."""
    (tmp_path / "graphs-2019").mkdir()
    (tmp_path / "graphs-2019" / "thesis.tex").write_text("mine")
    (tmp_path / "graphs-notes").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "graphs-link").symlink_to("elsewhere")
    before = sorted(tmp_path.rglob("*"))
    folder = run_stage(tmp_path, "graphs", "k1", write_result)
    assert sorted(path for path in tmp_path.rglob("*") if folder not in (path, *path.parents)) == before


@pytest.mark.parametrize("name", ["graphs-k1", "graphs-k1.tmp"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_in_the_way_is_never_removed(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name} is in the way of a result, but this project did not make it"):
        run_stage(tmp_path, "graphs", "k1", write_result)
    assert os.path.lexists(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("mad!"),  # of the same length
        lambda path: path.write_text(""),
        lambda path: path.write_text("longer"),
        lambda path: path.unlink(),
        lambda path: path.with_name(CONTENTS_FILE).unlink() or path.unlink(),
        lambda path: path.with_name(CONTENTS_FILE).write_text(""),
        lambda path: path.with_name(CONTENTS_FILE).write_text("[1]"),
    ],
)
def test_a_damaged_result_is_made_again(tmp_path, change):
    folder = run_stage(tmp_path, "graphs", KEY, write_result)
    assert is_whole(folder)
    change(folder / "result")
    assert not is_whole(folder)
    run_stage(tmp_path, "graphs", KEY, write_result)
    assert is_whole(folder)
    assert (folder / "result").read_text() == "made"


def test_a_planted_result_is_not_used(tmp_path, monkeypatch):
    """In a shared workspace: whole, with right sums, but another user's."""
    folder = run_stage(tmp_path, "graphs", "k1", write_result)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not is_whole(folder)


def test_a_workspace_is_marked(tmp_path):
    claim(tmp_path / "new" / "workspace")
    assert (tmp_path / "new" / "workspace" / TAG_FILE).read_text().startswith("Signature: 8a477f597d28d172")
    claim(tmp_path / "new" / "workspace")


def test_a_folder_with_other_contents_is_no_workspace(tmp_path):
    (tmp_path / "library-2019").mkdir()
    with pytest.raises(UserError, match="holds 'library-2019', but no CACHEDIR"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["library-2019"]


def test_the_workspace_of_another_user_is_refused(tmp_path, monkeypatch):
    claim(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match=f"belongs to the user {os.getuid()}, expected this one"):
        claim(tmp_path)


def test_a_workspace_that_anybody_may_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match="any user can write to the workspace"):
        claim(tmp_path)


def test_a_stage_does_not_wait_for_the_compile_that_started_it(tmp_path):
    with locked(tmp_path, print):
        code = "import sys, pathlib, export.workspace as w\nwith w.locked(pathlib.Path(sys.argv[1]), sys.exit): pass"
        subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, timeout=60)


HOLD = """
import sys
from pathlib import Path
from export.workspace import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_waits_and_says_so(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        told, entered = threading.Event(), threading.Event()
        messages = []

        def announce(message):
            messages.append(message)
            told.set()

        def second():
            with locked(tmp_path, announce):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(30)
        assert not entered.is_set()
        assert str(tmp_path) in messages[0]
        assert "waiting" in messages[0]
        holder.stdin.close()
        assert entered.wait(30)
        thread.join()


def test_a_killed_process_holds_no_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    messages = []
    with locked(tmp_path, messages.append):
        pass
    assert messages == []


@pytest.mark.parametrize(("text", "peak"), [("123\n", 123), ("", None), ("12x", None)])
def test_a_note_of_a_peak_that_was_cut_short_is_none(tmp_path, text, peak):
    (tmp_path / PEAK_FILE).write_text(text)
    assert noted_peak(tmp_path) == peak
