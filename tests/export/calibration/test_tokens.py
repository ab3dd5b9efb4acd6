"""Rows of token ids from a calibration text."""

import msgspec
import numpy as np
import pytest

from export.calibration import tokens as module
from export.calibration.fixed_text import Text
from export.calibration.methods import LENGTH
from export.calibration.tokens import PASSAGES, calibration_rows, passages
from export.checkpoints.checkpoint import open_checkpoint
from export.weights.storing import record_of, write_tokenizer
from runtime.artifact.manifest import Quantization
from runtime.errors import UserError
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.tiny import write_tiny_mistral


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A record with a tokenizer of bytes, and the folder that holds its files."""
    folder = tmp_path_factory.mktemp("tokens") / "tiny"
    write_tiny_mistral(folder)
    checkpoint = open_checkpoint(folder, "auto", {})
    record = record_of(checkpoint, Quantization(scheme="none"), "fp32", {})
    stored = folder.parent / "stored"
    stored.mkdir()
    write_tokenizer(checkpoint, record, stored)
    return record, stored


def rows(tiny, content, count=4, **changes):
    record, folder = tiny
    model = msgspec.structs.replace(record.model, **changes)
    return calibration_rows(Text("the text", content), count, model, record.tokenizer, folder)


def words(count):
    return " ".join(f"word{i:06}" for i in range(count))


def test_rows_are_taken_from_the_whole_text(tiny):
    """Each begins with bos and goes on with what the tokenizer makes of the passages, in order."""
    content = words(10_000)
    found = rows(tiny, content)
    assert found.shape == (4, LENGTH)
    assert (found[:, 0] == tiny[0].tokenizer.bos_id).all()
    tokenizer = open_tokenizer(tiny[0].tokenizer, tiny[1])
    text = tokenizer.decode(found[:, 1:].ravel().tolist())
    numbers = [int(part[:6]) for part in text.split("word")[1:] if part[:6].isdigit() and len(part) >= 6]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] > 10_000 * (PASSAGES - 1) / PASSAGES


def test_a_short_text_gives_fewer_or_shorter_rows(tiny):
    assert rows(tiny, words(110)).shape == (2, LENGTH)  # 1209 bytes
    assert rows(tiny, words(40)).shape[0] == 1


def test_rows_are_no_longer_than_the_model_was_trained_for(tiny):
    assert rows(tiny, words(1000), context_length=100).shape == (4, 100)


@pytest.mark.parametrize("content", ["", "a few words", words(20)])
def test_a_text_that_is_too_short_is_refused(tiny, content):
    with pytest.raises(UserError, match=r"the text has \d+ tokens, expected at least 256; name a longer text"):
        rows(tiny, content)


def test_tokens_that_the_model_lacks_are_refused(tiny):
    with pytest.raises(UserError, match=r"finds the token \d+ in the calibration text the text, but the model has 40"):
        rows(tiny, words(100), vocab_size=40)


def test_a_tokenizer_that_fails_is_told(tiny, monkeypatch):
    monkeypatch.setattr(module, "MODULE", "nowhere")
    with pytest.raises(UserError, match="the tokenizer fails on the calibration text the text: it ended with status 1"):
        rows(tiny, words(100))


def test_passages_are_spread_and_begin_with_words():
    content = words(1000)
    found = passages(content, tokens=80)
    assert len(found) == PASSAGES
    assert all(len(piece) <= 80 for piece in found)
    places = [content.index(piece) for piece in found]
    assert places == sorted(places)
    assert all(piece.startswith("word") for piece in found)
    assert len("".join(passages(content, tokens=10**6))) > 0.9 * len(content)
    assert np.diff(places).max() < 1000
