import random

import pytest

from runtime.errors import UserError
from runtime.text.stream import Step, StreamDecoder, TextStream, with_text


def characters(ids):
    return "".join(map(chr, ids))


def steps_of(text, reason="length"):
    return [Step(ord(letter), finish_reason=reason if i == len(text) - 1 else None) for i, letter in enumerate(text)]


def run(text, stops, reason="length"):
    return list(with_text(iter(steps_of(text, reason)), TextStream(StreamDecoder(characters), stops)))


def test_text_ends_before_the_first_stop_string_whatever_the_split():
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices("ab", k=draw.randint(1, 10)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 2))]
        steps = run(text, stops)
        # the first stop string to be complete ends the text
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if ends:
            seen = text[: min(ends)]
            assert (
                "".join(step.text for step in steps)
                == seen[: min(place for stop in stops if (place := seen.find(stop)) >= 0)]
            )
            assert len(steps) == min(ends)
            assert steps[-1].finish_reason == "stop"
        else:
            assert "".join(step.text for step in steps) == text
            assert steps[-1].finish_reason == "length"
        assert all(step.finish_reason is None for step in steps[:-1])


def test_only_what_may_begin_a_stop_string_is_held_back():
    assert [step.text for step in run("abcabd.", ["abd"])] == ["", "", "abc", "", "", ""]
    assert [step.text for step in run("one", [])] == ["o", "n", "e"]
    assert [step.text for step in run("xab", ["abc"])] == ["x", "", "ab"]  # the end releases the rest


def test_an_end_of_sequence_has_no_text():
    assert [step.text for step in run("ab#", ["bc"], reason="stop")] == ["a", "", "b"]


def test_the_stop_string_that_comes_first_is_named():
    text = TextStream(StreamDecoder(characters), ["cd", "bcd", "x"])
    steps = list(with_text(iter(steps_of("abcdx")), text))
    assert (steps[-1].stop, steps[-1].finish_reason) == ("bcd", "stop")
    assert not any(step.stop for step in steps[:-1])


def test_an_id_that_stops_has_no_text_and_releases_what_was_held():
    text = TextStream(StreamDecoder(characters), ["bcd"], {ord("#"): "END"})
    steps = list(with_text(iter(steps_of("abc#bcd")), text))
    assert [step.text for step in steps] == ["a", "", "", "bc"]
    assert [step.stop for step in steps] == [None, None, None, "END"]
    assert steps[-1].finish_reason == "stop"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(StreamDecoder(characters), ["x", ""])


def counting_decoder(decode):
    """A decoder, and the numbers of ids that it was asked to decode."""
    lengths = []

    def counted(ids):
        lengths.append(len(ids))
        return decode(ids)

    return lengths, counted


def test_the_work_for_an_id_does_not_grow_with_the_ids_before_it():
    """Be they ids without text, bytes that are no UTF-8, or a long prompt."""
    utf_8 = lambda ids: bytes(id for id in ids if id < 256).decode(errors="replace")  # noqa: E731
    run = [256] * 1000 + [0x80] * 1000 + [256] * 1000 + list("ä€😀".encode()) * 20
    lengths, counted = counting_decoder(utf_8)
    stream = StreamDecoder(counted, after=list(b"word") * 1000)
    pieces = [stream.push(token_id) for token_id in run]
    assert "".join(pieces) + stream.flush() == utf_8(run)
    assert max(lengths) < 100
