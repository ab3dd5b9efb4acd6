"""`/v1/completions` with `echo` and `logprobs`: log probabilities of the prompt's own tokens."""

import threading

import numpy as np
import pytest

from runtime.server.running.served_model import open_served_model
from tests.helpers.artifacts import CACHE_LEN, bound, onnx_shifted, random_ids
from tests.helpers.serving import NAME, running

LIKELIEST = 3
LENGTH = 23


@pytest.fixture(scope="module")
def case(compile_case):
    return compile_case("batched")


@pytest.fixture(scope="module")
def server(case):
    with running(lambda: open_served_model(case.artifact, 1, 0)) as server:
        yield server


def ask(server, prompt, **fields):
    body = {"model": NAME, "prompt": prompt, "echo": True, "logprobs": LIKELIEST, "temperature": 0, **fields}
    answer = server.ask("/v1/completions", body)
    assert answer.status == 200, answer.body
    return answer.json


def test_they_follow_onnxruntime(case, server):
    vocab = case.checkpoint.model.vocab_size
    ids = random_ids(LENGTH, vocab, 3)
    model = onnx_shifted(case.graphs)
    logits = np.concatenate([model.step(np.array([[token]]), np.array([i])) for i, token in enumerate(ids)])
    logits = logits.astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # a log probability is one logit minus a mean of them
    limit = 2 * bound(case.graphs) * np.abs(logits).max()
    (choice,) = ask(server, ids, max_tokens=1)["choices"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == LENGTH + 1
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    of_ids = [expected[i, token] for i, token in enumerate(ids[1:])]
    np.testing.assert_allclose(found["token_logprobs"][1:-1], of_ids, rtol=0, atol=limit)
    assert found["token_logprobs"][-1] == pytest.approx(expected[-1].max(), abs=limit)
    for i, likeliest in enumerate(found["top_logprobs"][1:]):
        assert 1 <= len(likeliest) <= LIKELIEST  # different tokens may have the same text
        assert max(likeliest.values()) == pytest.approx(expected[i].max(), abs=limit)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_stream_and_a_whole_answer_say_the_same(server, max_tokens):
    ids = random_ids(LENGTH, 200, 4)
    whole = ask(server, ids, max_tokens=max_tokens)
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == max_tokens
    assert len(choice["logprobs"]["tokens"]) == LENGTH + max_tokens
    body = {"prompt": ids, "echo": True, "logprobs": LIKELIEST, "temperature": 0, "max_tokens": max_tokens}
    events = [event["choices"][0] for event in server.stream(body, "/v1/completions")[:-1]]
    assert "".join(event["text"] for event in events) == choice["text"]
    assert [token for event in events for token in event["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
    logprobs = [number for event in events for number in event["logprobs"]["token_logprobs"]]
    assert logprobs == choice["logprobs"]["token_logprobs"]
    assert [event["finish_reason"] for event in events][-1] == "length"


def test_without_logprobs_the_prompt_comes_alone(server):
    (choice,) = ask(server, "some text", logprobs=None, max_tokens=0)["choices"]
    assert choice == {"index": 0, "text": "some text", "logprobs": None, "finish_reason": "length"}


def test_tokens_stand_where_their_text_begins(server):
    (choice,) = ask(server, "some text", max_tokens=0)["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "some text"
    places = [place for token, place in zip(found["tokens"], found["text_offset"], strict=True) if token in "some text"]
    assert places == sorted(places)
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][place:].startswith(token) or token == "<s>"


def test_several_prompts_and_choices(server):
    """As lm-evaluation-harness asks: lists of ids, one token, which it drops."""
    prompts = [random_ids(length, 200, length) for length in (5, 1, 30)]
    alone = [ask(server, ids, max_tokens=1)["choices"][0] for ids in prompts]
    together = ask(server, prompts, max_tokens=1, n=2)["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    for number, choice in enumerate(together):
        assert choice["logprobs"] == alone[number // 2]["logprobs"]
        assert choice["text"] == alone[number // 2]["text"]


def test_the_bits_are_the_same_beside_others(server):
    ids = random_ids(CACHE_LEN - 4, 200, 9)
    alone = ask(server, ids, max_tokens=0)["choices"][0]["logprobs"]
    others = [
        threading.Thread(
            target=server.ask, args=("/v1/completions", {"model": NAME, "prompt": [i, 7], "max_tokens": 20})
        )
        for i in range(3)
    ]
    for thread in others:
        thread.start()
    again = ask(server, ids, max_tokens=0)["choices"][0]["logprobs"]
    for thread in others:
        thread.join()
    assert again == alone


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 0, "echo": False}, {"max_tokens": 0, "n": 2}, {"max_tokens": -1}],
)
def test_nothing_can_be_generated_only_with_echo(server, fields):
    answer = server.ask("/v1/completions", {"model": NAME, "prompt": "x", "echo": True, **fields})
    assert (answer.status, answer.error["param"]) == (400, "max_tokens")
