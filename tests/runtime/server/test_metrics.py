"""`/metrics`, read by Prometheus' own parser."""

import itertools
import json
import time
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.errors import UserError
from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, VOCAB, ScriptedEngine, write_tokenizer
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import NAME, running, served, until

# The names and types that vLLM's dashboards ask for (vllm/v1/metrics/loggers.py, commit 005a810); the parser leaves out
# the _total of counters.
GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
COUNTERS = {
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:iteration_tokens_total",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """What a server says after three answers of three tokens, by name."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = open_tokenizer(SPEC, folder)
    model = ScriptedEngine(itertools.repeat([*PIECES.encode("Bonjour, tout le monde"), EOS]))
    model.manifest = SimpleNamespace(model=SimpleNamespace(generates=True, head="causal_lm", vocab_size=VOCAB))
    with running(lambda: served(model, tokenizer, InstructEncoder("v3", tokenizer))) as server:
        for _ in range(3):
            server.chat(max_tokens=3)
        answer = server.ask("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {family.name: family for family in text_string_to_metric_families(answer.body.decode())}


def value_of(families, family, sample=None, **labels):
    (found,) = [
        each.value
        for each in families[family].samples
        if each.name == (sample or family) and labels.items() <= each.labels.items()
    ]
    return found


@pytest.mark.parametrize(("kind", "names"), [("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS)])
def test_the_names_are_those_that_dashboards_ask_for(families, kind, names):
    for name in names:
        assert families[name].type == kind
        assert families[name].documentation
        assert all(sample.labels["model_name"] == NAME for sample in families[name].samples)


def test_figures_are_those_of_the_requests(families):
    assert value_of(families, "vllm:generation_tokens", "vllm:generation_tokens_total") == 9
    assert value_of(families, "vllm:request_success", "vllm:request_success_total", finished_reason="length") == 3
    assert value_of(families, "vllm:num_requests_running") == 0
    for name in HISTOGRAMS - {"vllm:iteration_tokens_total"}:
        assert value_of(families, name, f"{name}_count") == 3, name
        assert value_of(families, name, f"{name}_bucket", le="+Inf") == 3, name


def test_refusals_are_counted_by_their_status(families):
    asked = {"model": "another", "messages": [{"role": "user", "content": "x"}]}
    with running(scripted("Bonjour")) as server:
        assert server.ask("/v1/chat/completions", asked).status == 404
        found = {each.name: each for each in text_string_to_metric_families(server.ask("/metrics").body.decode())}
    counts = {each.labels["status"]: each.value for each in found["refused_requests"].samples}
    assert counts == {"429": 0, "503": 0, "404": 1}  # those that tell of load are there before the first one


def test_a_failed_engine_is_neither_ready_nor_healthy(families):
    assert value_of(families, "server_ready") == value_of(families, "server_healthy") == 1

    def broken():
        raise UserError("no such artifact")

    with running(broken, wait=False) as server:
        until(lambda: server.ask("/health").status == 503)
        text = server.ask("/metrics").body.decode()
    found = {each.name: each for each in text_string_to_metric_families(text)}
    assert value_of(found, "server_ready") == value_of(found, "server_healthy") == 0


def test_reasons_are_those_that_clients_are_told():
    """The engine is told to cancel what a stop string has ended, as it is when a client leaves."""
    with running(scripted("Bonjour tout le monde", "word " * 300, on_step=lambda _: time.sleep(0.01))) as server:
        assert server.chat(stop=["tout"], temperature=0).json["choices"][0]["finish_reason"] == "stop"
        connection = server.connect()
        body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "x"}]})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        until(lambda: server.service.generations.running == 1)
        connection.sock.close()
        connection.close()
        until(lambda: not server.service.generations.running)
        text = server.ask("/metrics").body.decode()
    found = {each.name: each for each in text_string_to_metric_families(text)}["vllm:request_success"].samples
    assert {each.labels["finished_reason"]: each.value for each in found} == {"stop": 1, "abort": 1}
