"""Requests that schemathesis makes from the OpenAPI file, right ones and wrong ones, to a server of a tiny model.

https://schemathesis.readthedocs.io: no answer may be a server's error, every answer has a status, a content type and a
body that the file tells, and requests that do not fit the file are refused.
"""

import copy
import json
from collections import defaultdict

import msgspec
import pytest

schemathesis = pytest.importorskip("schemathesis", reason="needs `make test-server`")

import hypothesis  # noqa: E402
from schemathesis.config import SchemathesisConfig  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from runtime.server.app import ENDPOINTS  # noqa: E402
from runtime.server.http.openapi import openapi_document  # noqa: E402
from runtime.server.running.served_model import open_served_model  # noqa: E402
from runtime.server.settings import ServerSettings  # noqa: E402
from tests.helpers.serving import NAME, running  # noqa: E402

DOCUMENT = json.loads(msgspec.json.encode(openapi_document(ENDPOINTS)))
EXAMPLES = 60  # of each address, beside those at the borders of every field
MOST_SECONDS = 10  # that one answer may take
# A request that fits the file can still be one that this model cannot answer: a prompt that is too long, fields that
# exclude each other.
LEFT_OUT = [positive_data_acceptance]
# Fields that the tiny model has no use for, or that exclude others; without them most right requests are answered.
SELDOM_ANSWERED = (
    "best_of",
    "metadata",
    "response_format",
    "store",
    "stream_options",
    "suffix",
    "tool_choice",
    "tools",
    "top_logprobs",
)
PROMPTS = {
    "messages": {"enum": [[{"role": "user", "content": "Hello"}]]},
    "prompt": {"enum": ["Hello", [1, 5]]},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
}
GENERATING = ("/v1/chat/completions", "/v1/completions")

settings = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(scope="module")
def asked():
    """For each address and kind of answer, whether each request was answered; many must have been.

    The others had a bias for an id that is no number, and the like.
    """
    found = defaultdict(list)
    yield found
    assert all(sum(answered) >= 5 for answered in found.values()), found


@pytest.fixture(scope="module")
def server(compile_case):
    folder = compile_case("int8").artifact  # whose sequences have at most 40 tokens
    with running(lambda: open_served_model(folder, 1, 0), ServerSettings(default_max_tokens=8)) as found:
        yield found


def api(mode, changes, required=()):
    """The file as schemathesis reads it, with some schemas of requests' fields changed; None leaves a field out."""
    document = copy.deepcopy(DOCUMENT)
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request"):
            schema["required"] = [*schema.get("required", ()), *required]
            for field in changes.keys() & schema["properties"].keys():
                if changes[field] is None:
                    del schema["properties"][field]
                else:
                    optional = [] if field in schema["required"] else [{"type": "null"}]
                    schema["properties"][field] = {"anyOf": [changes[field], *optional]}
    config = SchemathesisConfig.from_dict({"generation": {"mode": mode}})
    return schemathesis.openapi.from_dict(document, config=config)


THE_MODEL = {"model": {"enum": [NAME]}}  # all other names have the same end
anything = api("all", THE_MODEL)
ANSWERABLE = THE_MODEL | PROMPTS | dict.fromkeys(SELDOM_ANSWERED)
whole = api("positive", ANSWERABLE | {"stream": None}).include(path=list(GENERATING))
streams = api("positive", ANSWERABLE | {"stream": {"enum": [True]}}, required=["stream"]).include(path=list(GENERATING))


@anything.parametrize()
@settings
def test_every_answer_is_one_that_the_file_tells(case, server):
    case.call_and_validate(base_url=server.address, excluded_checks=LEFT_OUT, timeout=MOST_SECONDS)
    assert server.ask("/health").status == 200


@whole.parametrize()
@settings
def test_whole_answers_with_any_sampling_fit_the_file(case, server, asked):
    check_answer(case, server, "application/json", asked)


@streams.parametrize()
@settings
def test_streams_with_any_sampling_fit_the_file(case, server, asked):
    check_answer(case, server, "text/event-stream", asked)


def check_answer(case, server, kind, asked):
    answer = case.call_and_validate(base_url=server.address, excluded_checks=LEFT_OUT, timeout=MOST_SECONDS)
    asked[case.operation.path, kind].append(answer.status_code == 200)
    if answer.status_code == 200:
        assert answer.headers["content-type"][0].startswith(kind)
