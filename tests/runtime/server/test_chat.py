"""`/v1/chat/completions` of a server with a scripted model."""

import types
from types import SimpleNamespace

import pytest

from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, VOCAB, ScriptedEngine, write_tokenizer
from tests.helpers.serving import running, served


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return open_tokenizer(SPEC, folder)


def scripted(tokenizer, *replies, **engine):
    """What opens a model that gives these texts, one for each prompt."""
    ids = [[*PIECES.encode(reply), EOS] if isinstance(reply, str) else reply for reply in replies]
    model = ScriptedEngine(ids, **engine)
    model.manifest = SimpleNamespace(model=types.SimpleNamespace(generates=True, head="causal_lm", vocab_size=VOCAB))
    return lambda: served(model, tokenizer, InstructEncoder("v3", tokenizer))


def test_an_answer_is_whole_or_a_stream(tokenizer):
    with running(scripted(tokenizer, "Bonjour, ça va ?", "Bonjour, ça va ?")) as server:
        whole = server.chat(temperature=0).json
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Bonjour, ça va ?"}
        assert whole["choices"][0]["finish_reason"] == "stop"
        events = server.stream({"messages": [{"role": "user", "content": "Hello"}], "temperature": 0})
        assert events[-1] == "[DONE]"
        deltas = [event["choices"][0]["delta"] for event in events[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == "Bonjour, ça va ?"
        reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
        assert reasons[-1] == "stop"
        assert set(reasons[:-1]) == {None}
