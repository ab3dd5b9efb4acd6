"""Embeddings and labels of a server whose model is a few lines of arithmetic, and what it does not take."""

import base64
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.errors import UserError
from runtime.server.settings import ServerSettings
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import SPEC, VOCAB, write_tokenizer
from tests.helpers.serving import NAME, running, served

LONGEST = 64
LABELS = ("cold", "warm")


class Head:
    """The state of a token is (id, 1); `on_call` is called before each text."""

    slots = 1

    def __init__(self, head, on_call=lambda: None):
        self.manifest = SimpleNamespace(
            model=SimpleNamespace(
                head=head,
                generates=False,
                dim=2,
                vocab_size=VOCAB,
                pool="last",
                normalize=False,
                labels=LABELS,
                label_scores="logits",
            )
        )
        self.on_call, self.texts = on_call, []

    def room(self, _slot):
        return LONGEST

    def tokens(self, _slot):
        return []

    def head_outputs(self, ids):
        self.on_call()
        if len(ids) > LONGEST:
            raise UserError(f"{len(ids)} more tokens do not fit")
        self.texts.append(ids)
        states = np.array([[token, 1] for token in ids], np.float32)
        return states[-1:] if self.manifest.model.head == "sequence_classification" else states


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return open_tokenizer(SPEC, folder)


@pytest.fixture
def open_head(tokenizer):
    return lambda head: running(lambda: served(head, tokenizer))


def embed(server, texts, **fields):
    return server.ask("/v1/embeddings", {"model": NAME, "input": texts, **fields})


def test_vectors_come_as_numbers_or_bytes(open_head):
    with open_head(Head("embedding")) as server:
        answer = embed(server, [[3, 4], [5]]).json
        assert answer["object"] == "list"
        assert answer["data"] == [
            {"object": "embedding", "index": 0, "embedding": [4, 1]},
            {"object": "embedding", "index": 1, "embedding": [5, 1]},
        ]
        assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        packed = embed(server, [3, 4], encoding_format="base64").json["data"][0]["embedding"]
        assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == [4, 1]
        text = server.ask("/metrics").body.decode()
        assert f'vllm:request_success_total{{finished_reason="stop",model_name="{NAME}"}} 3.0' in text
        assert f'vllm:prompt_tokens_total{{model_name="{NAME}"}} 5.0' in text
        assert server.ask("/slots").json["requests"] == {"running": 0, "finished": 2}


def test_labels_come_best_first_and_in_their_own_order(open_head):
    with open_head(Head("sequence_classification")) as server:
        (row,) = server.ask("/classify", {"model": NAME, "input": [0, 0]}).json["data"]
        assert row == {
            "object": "text_labels",
            "index": 0,
            "label": "warm",
            "score": 1,
            "scores": [{"label": "warm", "score": 1}, {"label": "cold", "score": 0}],
            "probs": [0, 1],
            "num_classes": 2,
        }


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        ({"input": []}, "input", "a list of nothing"),
        ({"input": [[]]}, "input", "no tokens"),
        ({"input": [[VOCAB]]}, "input", f"expected 0 to {VOCAB - 1}"),
        ({"input": [[1] * (LONGEST + 1)]}, "input", "do not fit"),
        ({"input": ["x"] * 2049}, "input", "at most 2048"),
        ({"input": [["x"]]}, "input", "Expected"),
        ({"input": "x", "dimensions": 3}, "dimensions", "expected 2"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "Invalid enum value"),
        ({"input": "x", "truncate": True}, "truncate", "not known"),
        ({"input": "x" * 100_000}, "input", "characters"),
    ],
)
def test_what_cannot_be_embedded_is_refused(open_head, body, param, expected):
    with open_head(Head("embedding")) as server:
        answer = server.ask("/v1/embeddings", {"model": NAME, **body})
        assert answer.status == 400
        assert answer.error["param"].startswith(param)
        assert expected in answer.error["message"]
        assert embed(server, "x").status == 200


@pytest.mark.parametrize(
    ("head", "path", "body"),
    [
        ("embedding", "/classify", {"input": "x"}),
        ("sequence_classification", "/v1/embeddings", {"input": "x"}),
        ("embedding", "/v1/completions", {"prompt": "x"}),
        ("embedding", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_a_model_is_asked_only_for_what_its_head_gives(open_head, head, path, body):
    with open_head(Head(head)) as server:
        answer = server.ask(path, {"model": NAME, **body})
        assert (answer.status, answer.error["code"]) == (400, "no_such_head")
        assert head in answer.error["message"]


@pytest.mark.parametrize(
    ("head", "body", "param"),
    [
        ("question_answering", {"input": "x"}, "question"),
        ("question_answering", {"input": "", "question": "x"}, "input"),
        ("question_answering", {"input": [1], "question": "x"}, "input"),
        ("token_classification", {"input": [1]}, "input"),
        ("token_classification", {"input": "x", "question": "x"}, "question"),
        ("sequence_classification", {"input": "x", "max_answer_tokens": 3}, "max_answer_tokens"),
    ],
)
def test_what_does_not_belong_to_a_head_is_refused(open_head, head, body, param):
    with open_head(Head(head)) as server:
        answer = server.ask("/classify", {"model": NAME, **body})
        assert (answer.status, answer.error["param"]) == (400, param)


def test_numbers_that_are_not_finite_are_an_error(open_head):
    head = Head("embedding")
    head.head_outputs = lambda ids: np.full((len(ids), 2), np.nan, np.float32)
    with open_head(head) as server:
        answer = embed(server, "x")
        assert answer.status == 500
        assert "nan or infinity" in answer.error["message"]


class Held:
    """Lets a head wait until it may go on."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.go_on.wait(20)


def test_a_full_queue_is_429_before_anything_is_tokenized(tokenizer):
    held = Held()
    head = Head("embedding", held)
    with running(lambda: served(head, tokenizer), ServerSettings(max_queued=2)) as server:
        first = server.connect()
        body = b'{"model": "served", "input": ["a", "b", "c"]}'
        first.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        assert held.begun.wait(20)
        slots = server.ask("/metrics").body.decode()
        assert f'vllm:num_requests_waiting{{model_name="{NAME}"}} 2.0' in slots
        answer = embed(server, "d")
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert answer.headers["retry-after"] == "1"
        held.go_on.set()
        assert first.getresponse().status == 200
        assert len(head.texts) == 3
        assert embed(server, "d").status == 200


def test_a_client_that_leaves_ends_its_texts(tokenizer):
    held = Held()
    head = Head("embedding", held)
    with running(lambda: served(head, tokenizer)) as server:
        first = server.connect()
        body = b'{"model": "served", "input": ["a", "b", "c"]}'
        first.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        assert held.begun.wait(20)
        first.close()
        deadline = time.monotonic() + 20
        while server.service.heads.running and time.monotonic() < deadline:
            time.sleep(0.01)
        held.go_on.set()
        assert embed(server, "d").status == 200
        assert len(head.texts) == 2  # that which had begun, and the other client's


def test_a_text_that_takes_too_long_is_504(tokenizer):
    held = Held()
    with running(lambda: served(Head("embedding", held), tokenizer), ServerSettings(request_seconds=0.2)) as server:
        answer = embed(server, "a")
        held.go_on.set()
        assert (answer.status, answer.error["code"]) == (504, "timeout")


def test_texts_that_have_begun_are_answered_before_the_end(tokenizer):
    held = Held()
    with running(lambda: served(Head("embedding", held), tokenizer)) as server:
        first = server.connect()
        body = b'{"model": "served", "input": ["a", "b"]}'
        first.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        assert held.begun.wait(20)
        server.end()
        while server.service.state != "draining":
            time.sleep(0.01)
        assert embed(server, "c").status == 503
        held.go_on.set()
        assert first.getresponse().status == 200
