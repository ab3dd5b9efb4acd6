"""`/v1/chat/completions` of a server with a scripted model."""

import json

import pytest

from tests.helpers.scripted_engine import EOS, PIECES
from tests.helpers.scripted_service import scripted, v3_tokenizer
from tests.helpers.serving import running

TEXT = "Bonjour, ça va ?"
HELLO = [{"role": "user", "content": "Hello"}]


def test_an_answer_is_whole_or_a_stream():
    with running(scripted(TEXT, TEXT)) as server:
        whole = server.chat(temperature=0).json
        assert whole["object"] == "chat.completion"
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": TEXT}
        assert whole["choices"][0]["finish_reason"] == "stop"
        events = server.stream({"messages": HELLO, "temperature": 0})
        assert events[-1] == "[DONE]"
        deltas = [event["choices"][0]["delta"] for event in events[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == TEXT
        reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]
        assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
        assert len({event["id"] for event in events[:-1]}) == 1
        assert "usage" not in events[0]


def test_the_usage_comes_in_a_chunk_without_choices():
    with running(scripted(TEXT)) as server:
        *chunks, last, done = server.stream({"messages": HELLO, "stream_options": {"include_usage": True}})
        assert done == "[DONE]"
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
        assert last["choices"] == []
        generated = len(PIECES.encode(TEXT)) + 1  # with the id that ends the text
        prompt = len(PIECES.encode("Hello")) + 3  # <s> [INST] Hello [/INST]
        assert last["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_count(name):
    with running(scripted(TEXT)) as server:
        answer = server.chat(**{name: 2}).json
        assert answer["usage"]["completion_tokens"] == 2
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["ça", ["va", "ça"], "a ?", "r, ç"])
def test_a_stop_string_is_found_across_tokens_and_never_shown(stop):
    stops = [stop] if isinstance(stop, str) else stop
    expected = TEXT[: min(TEXT.find(each) for each in stops if each in TEXT)]
    with running(scripted(TEXT, TEXT)) as server:
        choice = server.chat(stop=stop).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
        events = server.stream({"messages": HELLO, "stop": stop})[:-1]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected


def test_a_completion_takes_both_names_of_its_limit():
    with running(scripted(TEXT, TEXT)) as server:
        for name in ("max_tokens", "max_completion_tokens"):
            answer = server.ask("/v1/completions", {"model": "served", "prompt": "Hello", name: 2})
            assert answer.json["usage"]["completion_tokens"] == 2
        empty = server.ask("/v1/completions", {"model": "served", "prompt": [[]]})
        assert (empty.status, empty.error["code"]) == (400, None)  # it is not too long


def test_several_choices_share_a_prompt():
    with running(scripted("one", "two", "three", slots=3)) as server:
        answer = server.chat(n=3, temperature=0).json
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert {choice["message"]["content"] for choice in answer["choices"]} <= {"one", "two", "three"}
        assert answer["usage"]["prompt_tokens"] == len(PIECES.encode("Hello")) + 3


def test_log_probabilities_have_the_bytes_of_tokens():
    """A character of several byte tokens: each has its own byte, where text would show U+FFFD."""
    owl = PIECES.encode("🦉")
    with running(scripted([*owl, EOS])) as server:
        choice = server.chat(logprobs=True, top_logprobs=2, temperature=0).json["choices"][0]
        assert choice["message"]["content"] == "🦉"
        tokens = choice["logprobs"]["content"]
        assert bytes(byte for token in tokens for byte in token["bytes"]).lstrip(b" ").startswith("🦉".encode())
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)
        assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in tokens)


def test_without_log_probabilities_there_are_none():
    with running(scripted(TEXT)) as server:
        assert server.chat().json["choices"][0]["logprobs"] is None


BAD = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": HELLO, "temprature": 1}, "temprature"),
    ({"messages": HELLO, "temperature": -1}, "temperature"),
    ({"messages": HELLO, "top_p": 0}, "top_p"),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ({"messages": HELLO, "max_tokens": "5"}, "max_tokens"),
    ({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"messages": HELLO, "n": 17}, "n"),
    ({"messages": HELLO, "stop": ""}, "stop"),
    ({"messages": HELLO, "stop": ["x"] * 17}, "stop"),
    ({"messages": HELLO, "logit_bias": {"40000": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"-1": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"5": 101}}, "logit_bias[...]"),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": HELLO, "stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": HELLO, "store": True}, "store"),
    ({"messages": HELLO, "functions": []}, "functions"),
    ({"messages": HELLO, "seed": 2**63}, "seed"),
]


@pytest.fixture(scope="module")
def server():
    with running(scripted(*["fine"] * 3)) as server:
        yield server


@pytest.mark.parametrize(("body", "param"), BAD, ids=[f"{param}-{i}" for i, (_, param) in enumerate(BAD)])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_is_wrong_is_named(server, body, param, stream):
    answer = server.ask("/v1/chat/completions", {"model": "served", "stream": stream, **body})
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert (answer.error["param"] or "").startswith(param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"a": \xff}', b"[" * 100_000, b'"' + b"x" * 1000 + b'"'])
def test_a_body_that_is_no_request_is_refused(server, body):
    answer = server.ask("/v1/chat/completions", body)
    assert answer.status == 400, answer.body
    assert answer.error["message"]
    assert len(answer.body) < 2000


def test_another_model_is_not_found(server):
    answer = server.chat(model="gpt-4")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")


def test_tokens_of_a_text_are_the_tokenizers(server):
    answer = server.ask("/tokenize", {"prompt": TEXT}).json
    assert answer == {"count": len(PIECES.encode(TEXT)) + 1, "max_model_len": None, "tokens": [1, *PIECES.encode(TEXT)]}
    assert server.ask("/tokenize", {"prompt": TEXT, "add_special_tokens": False}).json["tokens"] == PIECES.encode(TEXT)
    chat = server.ask("/tokenize", {"messages": HELLO}).json["tokens"]
    assert v3_tokenizer().decode(chat).strip() == "Hello"
    assert server.ask("/detokenize", {"tokens": answer["tokens"]}).json == {"prompt": TEXT}
    assert server.ask("/detokenize", {"tokens": [40000]}).error["param"] == "tokens"
    assert server.ask("/detokenize", {"tokens": [1] * (2**18 + 1)}).error["param"] == "tokens"
    assert server.ask("/tokenize", {}).status == 400


def test_models_are_listed(server):
    (card,) = server.ask("/v1/models").json["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("served", "model", None)
    assert server.ask("/v1/models/served").json == card
    assert server.ask("/v1/models/other").status == 404


def test_addresses_and_methods(server):
    assert server.ask("/v1/nothing").status == 404
    answer = server.ask("/v1/chat/completions")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert json.loads(answer.body)["error"]["message"] == "/v1/chat/completions is not for GET, expected POST"
    assert server.ask("/health", method="HEAD").status == 200
