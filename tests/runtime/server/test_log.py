"""The log: one line of JSON for each request, with figures and without texts."""

import itertools
import json
import time
from types import SimpleNamespace

import pytest

from runtime.server.settings import ServerSettings
from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, VOCAB, ScriptedEngine, write_tokenizer
from tests.helpers.serving import NAME, running, served

REPLY = "Bonjour, tout le monde"
FIGURES = {"prompt_tokens", "completion_tokens", "cached_tokens", "ttft_seconds", "finish_reasons"}


@pytest.fixture(scope="module")
def open_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = open_tokenizer(SPEC, folder)

    def opened():
        model = ScriptedEngine(itertools.repeat([*PIECES.encode(REPLY), EOS]))
        config = SimpleNamespace(generates=True, head="causal_lm", vocab_size=VOCAB)
        model.manifest = SimpleNamespace(model=config)
        return served(model, tokenizer, InstructEncoder("v3", tokenizer))

    return opened


def lines_of(capsys):
    """The lines of the log since the last look, once the last request's is written."""
    time.sleep(0.1)
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_has_the_figures_of_its_request_and_no_text(open_model, capsys):
    with running(open_model) as server:
        answer = server.chat("What is secret?", user="u-17", temperature=0)
        (line,) = lines_of(capsys)
    usage = answer.json["usage"]
    assert {each: line[each] for each in ("method", "path", "status", "model", "user")} == {
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "model": NAME,
        "user": "u-17",
    }
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]
    assert line["cached_tokens"] == 0
    assert line["finish_reasons"] == ["stop"]
    assert 0 < line["ttft_seconds"] <= line["seconds"]
    assert "secret" not in json.dumps(line)
    assert "Bonjour" not in json.dumps(line)


def test_each_choice_and_each_prompt_has_its_reason(open_model, capsys):
    with running(open_model) as server:
        body = {"model": NAME, "prompt": ["a", "b"], "n": 2, "max_tokens": 2, "stream": True}
        server.ask("/v1/completions", body)
        server.chat(stop="tout")
        server.chat(max_tokens=1)
        batch, stopped, short = lines_of(capsys)
    assert batch["finish_reasons"] == ["length"] * 4
    assert batch["completion_tokens"] == 8
    assert stopped["finish_reasons"] == ["stop"]
    assert short["finish_reasons"] == ["length"]


def test_a_request_that_fails_has_its_sentence_and_one_that_generates_nothing_no_figures(open_model, capsys):
    with running(open_model) as server:
        server.ask("/v1/completions", {"model": NAME, "prompt": "a", "no_such_field": 1})
        server.ask("/slots")
        refused, slots = lines_of(capsys)
    assert refused["status"] == 400
    assert "no_such_field" in refused["error"]
    assert not FIGURES & (refused.keys() | slots.keys())
    assert "error" not in slots


def test_probes_are_logged_only_when_something_is_wrong(open_model, capsys):
    """A gateway asks each second."""
    with running(open_model) as server:
        server.ask("/health")
        server.ask("/ready")
        assert lines_of(capsys) == []
        server.service.state = "draining"
        assert server.ask("/ready").status == 503
        (line,) = lines_of(capsys)
        server.service.state = "ready"
    assert (line["path"], line["status"]) == ("/ready", 503)


def test_texts_are_logged_where_the_settings_say_so(open_model, capsys):
    with running(open_model, ServerSettings(log_prompts=True)) as server:
        server.chat("What is secret?", temperature=0)
        (line,) = lines_of(capsys)
    assert "What is secret?" in line["prompts"][0]
    assert line["answers"] == [REPLY]


def test_a_long_name_makes_neither_a_long_line_nor_a_long_answer(open_model, capsys):
    with running(open_model) as server:
        answer = server.chat(model="x" * 100_000, user="y" * 100_000)
        assert answer.status == 404
        assert len(answer.body) < 2000
        time.sleep(0.1)
        assert len(capsys.readouterr().err) < 3000
