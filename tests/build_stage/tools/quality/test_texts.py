"""The fixed texts, and how texts are cut: as whole rows, and as chunks by llama.cpp's convention."""

import dataclasses
import math

import pytest

from build.tools.quality.texts import (
    ROWS,
    check_chunks,
    chunks,
    open_texts,
    whole_rows,
)
from export.calibration.fixed_text import FIXED_TEXTS, OPTICKS, PYTHON_SOURCE, Text
from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.tokenizer import Tokenizer, open_tokenizer
from tests.helpers.tiny import byte_tokenizer

BOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token for each byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(320).save(str(folder / "tokenizer.json"))
    return open_tokenizer(TokenizerSpec("tokenizer.json", "tokenizer.json", BOS, True, (2,)), folder)


@pytest.fixture
def without_bos(tokenizer):
    library = tokenizer._library
    return Tokenizer(TokenizerSpec("tokenizer.json", "tokenizer.json", BOS, False, (2,)), library)


def letters(count):
    return Text("letters", "".join(chr(ord("a") + i % 26) for i in range(count)))


@pytest.mark.parametrize("fixed", FIXED_TEXTS)
def test_a_fixed_text_is_long_enough(fixed):
    content = fixed.open().content
    assert content.startswith(fixed.start)
    assert len(content) > 8 * ROWS * fixed.length  # a token is about four letters


def test_the_fixed_texts_are_of_different_kinds():
    assert "Rays of Light" in OPTICKS.open().content
    compile(PYTHON_SOURCE.open().content, "compiler.py", "exec")
    assert [text.name for text in open_texts(None)] == [OPTICKS.name, PYTHON_SOURCE.name]


def test_another_text_is_refused():
    with pytest.raises(UserError, match=r"Opticks\.txt is not the text that quality is measured on"):
        dataclasses.replace(OPTICKS, sha256="0" * 64).open()


def test_a_package_that_is_absent_is_refused():
    with pytest.raises(UserError, match="nowhere/x is not the text that quality is measured on"):
        dataclasses.replace(OPTICKS, package="nowhere", member="x").open()


def test_a_file_takes_the_place_of_the_fixed_texts(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Grüße")
    (found,) = open_texts(path)
    assert (found.name, found.content) == (str(path), "Grüße")


@pytest.mark.parametrize(
    ("data", "message"), [(None, "cannot be read: No such file"), (b"\xff\xfe\x00", "is not text in UTF-8")]
)
def test_a_file_that_is_no_text_is_refused(tmp_path, data, message):
    if data is not None:
        (tmp_path / "mine.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_texts(tmp_path / "mine.txt")


def test_a_file_that_takes_minutes_to_tokenize_is_refused(tmp_path):
    with (tmp_path / "mine.txt").open("wb") as file:
        file.truncate(2**23 + 1)
    with pytest.raises(UserError, match=r"mine\.txt has 8388609 bytes, expected at most 8388608; cut it"):
        open_texts(tmp_path / "mine.txt")


def test_rows_continue_each_other(tokenizer):
    found = whole_rows(letters(1000), tokenizer, rows=3, slots=50)
    assert found.ids.shape == (3, 51)
    assert (found.unscored, found.scored) == (0, 150)
    joined = [*found.ids[0], *found.ids[1, 1:], *found.ids[2, 1:]]
    assert joined == tokenizer.encode(letters(1000).content)[:151]
    assert joined[0] == BOS
    assert found.scored_bytes == 150  # one byte for each token but the first, which is bos


def test_rows_of_a_short_text_are_shorter(tokenizer):
    found = whole_rows(letters(120), tokenizer, rows=2, slots=1024)
    assert found.ids.shape == (2, 61)  # 121 tokens with bos


def test_rows_are_no_longer_than_their_text_says(tokenizer):
    text = dataclasses.replace(letters(1000), length=70)
    assert whole_rows(text, tokenizer, rows=2, slots=1024).ids.shape == (2, 71)


def test_chunks_follow_llama_cpp(tokenizer):
    """With n_ctx = 8, the logits after the tokens 4, 5 and 6 of each chunk predict its tokens 5, 6 and 7.

    llama.cpp cuts the tokens, bos among them, into chunks and puts bos in the place of each chunk's first token.
    """
    text = letters(8 * 40 + 3)
    ids = tokenizer.encode(text.content)
    found = chunks(text, tokenizer, context=8, most=None)
    assert found.ids.shape == (40, 8)
    for chunk, start in zip(found.ids.tolist(), range(0, 8 * 40, 8), strict=True):
        assert chunk == [BOS, *ids[start + 1 : start + 8]]
    assert found.ids.shape[1] - 1 - found.unscored == 3
    assert (found.unscored, found.scored, found.scored_bytes) == (4, 120, 120)


def test_chunks_of_an_odd_length(tokenizer):
    """n_ctx / 2 is rounded down: with 9, the logits after the tokens 4 to 7 count, which are n_ctx - 1 - n_ctx / 2."""
    assert chunks(letters(9 * 30), tokenizer, context=9, most=None).scored == 30 * 4


def test_chunks_keep_their_first_token_without_bos(without_bos):
    text = letters(8 * 40)
    found = chunks(text, without_bos, context=8, most=None)
    assert found.ids.reshape(-1).tolist() == without_bos.encode(text.content)


def test_chunks_may_be_limited(tokenizer):
    assert len(chunks(letters(8 * 100), tokenizer, context=8, most=35).ids) == 35


def test_a_character_of_several_tokens_counts_its_bytes(tokenizer):
    """Each umlaut is two tokens, one for each of its bytes."""
    text = Text("umlauts", "ä" * 100)
    found = whole_rows(text, tokenizer, rows=1, slots=200)
    assert found.ids.shape == (1, 201)
    assert found.scored_bytes == 200


@pytest.mark.parametrize(
    ("cut", "least"),
    [
        (lambda text, tokenizer: whole_rows(text, tokenizer, rows=8, slots=1024), 8 * 13 + 1),
        (lambda text, tokenizer: chunks(text, tokenizer, context=128, most=None), 2 * 128),
    ],
)
def test_a_text_too_short_for_statistics_is_refused(tokenizer, cut, least):
    message = f"letters has {least - 1} tokens, expected at least {least}, so that 100 are scored"
    with pytest.raises(UserError, match=message):
        cut(letters(least - 2), tokenizer)
    assert cut(letters(least - 1), tokenizer).scored >= 100


@pytest.mark.parametrize(
    ("context", "most", "message"),
    [
        (3, None, "--context is 3, expected at least 4 tokens"),
        (-512, None, "--context is -512, expected at least 4 tokens"),
        (128, 1, "--chunks is 1, expected at least 2 of 128 tokens, so that 100 are scored"),
        (None, 5, "--chunks limits the chunks that --context makes: pass --context with it"),
    ],
)
def test_senseless_chunks_are_refused(context, most, message):
    with pytest.raises(UserError, match=message):
        check_chunks(context, most)


@pytest.mark.parametrize("context", [4, 5, 8, 127, 128, 512])
def test_the_least_number_of_chunks_is_accepted(context, tokenizer):
    least = math.ceil(100 / (context - 1 - context // 2))
    check_chunks(context, least)
    assert chunks(letters(least * context), tokenizer, context, least).scored >= 100
