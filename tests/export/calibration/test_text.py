"""Calibration texts: the unused part of the fixed one, files in both forms, and every refusal."""

import json

import pytest

from export.calibration import fixed_text
from export.calibration import text as module
from export.calibration.fixed_text import FIXED_TEXTS, OPTICKS
from export.calibration.text import open_text
from runtime.errors import UserError

WORDS = "A mind needs books as a sword needs a whetstone if it is to keep its edge and so I read on."


def test_no_passage_serves_both():
    evaluated, rest = OPTICKS.open().content, OPTICKS.rest().content
    assert evaluated.startswith("DEFIN. I.")
    assert min(len(evaluated), len(rest)) > 250_000
    assert rest[0].isalpha()
    assert all(fixed.open().content for fixed in FIXED_TEXTS)
    assert open_text(None) == OPTICKS.rest()


def test_another_file_in_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(fixed_text, "OPTICKS", OPTICKS)
    other = fixed_text.FixedText("x", OPTICKS.package, OPTICKS.member, "0" * 64, "DEFIN. I.")
    with pytest.raises(UserError, match=r"Opticks\.txt is not the text that quality is measured on"):
        other.open()


def test_a_file_is_one_text(tmp_path):
    path = tmp_path / "my text"
    path.write_bytes(b"\xef\xbb\xbf" + WORDS.encode())
    assert open_text(path).content == WORDS


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json"])
def test_lines_with_a_text_each(tmp_path, name):
    path = tmp_path / name
    path.write_text(f"{json.dumps({'text': 'one', 'id': 3})}\n\n{json.dumps({'text': 'two'})}\r\n")
    assert open_text(path).content == "one\n\ntwo"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "x"', "line 2 is not valid JSON: "),
        ('{"messages": []}', 'line 2 is no object with a text, expected {"text": "..."}; write one on each line'),
        ('{"text": ["x"]}', "line 2 is no object with a text"),
        ('"text"', "line 2 is no object with a text"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('{"text": "\\ud800"}', "line 2 is not valid JSON: "),
    ],
)
def test_a_line_without_a_text_is_refused(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + line)
    with pytest.raises(UserError) as told:
        open_text(path)
    assert f"quantize.calibration: {path}, {said}" in str(told.value)


def test_a_file_that_is_no_text_or_too_long_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match=r"a\.txt cannot be read: No such file"):
        open_text(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        open_text(path)
    monkeypatch.setattr(module, "MAX_BYTES", 2)
    with pytest.raises(UserError, match="has 3 bytes, expected at most 2"):
        open_text(path)


@pytest.mark.parametrize("fixed", FIXED_TEXTS, ids=lambda fixed: fixed.package)
def test_a_passage_of_the_evaluation_is_refused(tmp_path, fixed):
    """However it is broken into lines, and whatever its case."""
    words = fixed.open().content[20_000:21_000].split()[3:]
    path = tmp_path / "a.txt"
    path.write_text(WORDS + "\n" + "\n".join(words[:40]).upper())
    with pytest.raises(UserError) as told:
        open_text(path)
    assert f"{path} shares the words" in str(told.value)
    assert f"with {fixed.name}, on which quality is measured; name another text" in str(told.value)


def test_a_phrase_is_no_passage(tmp_path):
    words = [match[0] for match in module.WORD.finditer(OPTICKS.open().content[20_000:21_000])]
    path = tmp_path / "a.txt"
    path.write_text(" ".join(words[: module.SHARED_WORDS - 1]) + " " + WORDS)
    assert open_text(path).content
    path.write_text(" ".join(words[: module.SHARED_WORDS]) + " " + WORDS)
    with pytest.raises(UserError, match="shares the words"):
        open_text(path)
