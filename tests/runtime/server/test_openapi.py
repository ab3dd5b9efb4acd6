"""The OpenAPI file: its structure by JSON Schema's own rules, every address and type in it, and that answers fit it."""

import itertools
import json
from types import SimpleNamespace

import jsonschema
import msgspec
import pytest

from runtime.server.app import ENDPOINTS
from runtime.server.http.openapi import openapi_document
from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, VOCAB, ScriptedEngine, write_tokenizer
from tests.helpers.serving import NAME, running, served

DOCUMENT = json.loads(msgspec.json.encode(openapi_document(ENDPOINTS)))
OPERATIONS = {
    (method.upper(), path): operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
CHAT = OPERATIONS["POST", "/v1/chat/completions"]


def references(part):
    """Every `$ref` and every target of a discriminator in a part of the file."""
    if isinstance(part, dict):
        found = [part["$ref"]] if "$ref" in part else []
        found += part.get("discriminator", {}).get("mapping", {}).values()
        return found + [each for value in part.values() for each in references(value)]
    return [each for value in part for each in references(value)] if isinstance(part, list) else []


def schema_of(part):
    """A schema of the file with what it refers to."""
    return {**part, "components": DOCUMENT["components"]}


def request_schema(path):
    return schema_of(OPERATIONS["POST", path]["requestBody"]["content"]["application/json"]["schema"])


def event_schemas(operation):
    """The schemas of which the data of an event fits one."""
    event = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    end, data = event["properties"]["data"]["anyOf"]
    assert end == {"const": "[DONE]"}
    return data["contentSchema"]["anyOf"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = open_tokenizer(SPEC, folder)
    model = ScriptedEngine(itertools.repeat([*PIECES.encode("Bonjour"), EOS]))
    model.manifest = SimpleNamespace(model=SimpleNamespace(generates=True, head="causal_lm", vocab_size=VOCAB))
    with running(lambda: served(model, tokenizer, InstructEncoder("v3", tokenizer))) as found:
        yield found


def test_every_address_is_in_the_file():
    assert set(OPERATIONS) == {(each.method, each.path.replace(":path", "")) for each in ENDPOINTS}
    for each in ENDPOINTS:
        operation = OPERATIONS[each.method, each.path.replace(":path", "")]
        assert operation["summary"] == each.summary
        assert ("requestBody" in operation) == (each.method == "POST")


def test_schemas_are_schemas_and_references_lead_somewhere():
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    found = references(DOCUMENT)
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in DOCUMENT["components"]["schemas"], reference


def test_names_of_schemas_are_those_of_openapi():
    for name in DOCUMENT["components"]["schemas"]:
        assert name.replace(".", "").replace("_", "").replace("-", "").isalnum(), name


def test_every_answer_names_its_type_and_every_failure_the_error_body():
    for (_, path), operation in OPERATIONS.items():
        error = "Error" if path.startswith("/v1/messages") else "ErrorBody"
        assert {"200", "421", "500"} <= set(operation["responses"])
        for status, response in operation["responses"].items():
            assert response["description"]
            (schema, *_) = (each["schema"] for each in response["content"].values())
            if int(status) >= 400 and schema["$ref"] != "#/components/schemas/Health":
                assert schema == {"$ref": f"#/components/schemas/{error}"}


def test_a_stream_is_server_sent_events_of_a_known_type():
    content = CHAT["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert {"$ref": "#/components/schemas/ChatChunk"} in event_schemas(CHAT)


def test_keys_are_asked_for_but_not_where_none_is_needed():
    assert DOCUMENT["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert OPERATIONS["GET", "/health"]["security"] == []
    assert "security" not in CHAT
    assert "401" in CHAT["responses"]


def test_fields_that_are_not_listed_do_not_fit():
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}
    jsonschema.validate(body, request_schema("/v1/chat/completions"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**body, "temprature": 1}, request_schema("/v1/chat/completions"))


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_completions_take_prompts_of_every_form(server, prompt):
    body = {"model": NAME, "prompt": prompt, "max_tokens": 1}
    jsonschema.validate(body, request_schema("/v1/completions"))
    assert server.ask("/v1/completions", body).status == 200


def test_a_list_of_different_prompts_is_refused(server):
    answer = server.ask("/v1/completions", {"model": NAME, "prompt": ["a", 1]})
    assert answer.status == 400
    assert answer.error["param"] == "prompt"


def test_the_server_gives_the_file_and_its_answers_fit_it(server):
    given = server.ask("/openapi.json")
    assert given.headers["content-type"] == "application/json"
    assert given.json == DOCUMENT
    for (method, path), operation in OPERATIONS.items():
        if method == "GET" and path not in ("/", "/metrics", "/openapi.json"):
            answer = server.ask(path.replace("{name}", NAME))
            assert answer.status == 200
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            jsonschema.validate(answer.json, schema_of(schema))
    body = {"model": NAME, "prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    events = server.stream(body, "/v1/completions")
    chunk, _error = event_schemas(OPERATIONS["POST", "/v1/completions"])
    for event in events[:-1]:
        jsonschema.validate(event, schema_of(chunk))
    missing = server.ask("/v1/models/other")
    assert missing.status == 404
    jsonschema.validate(missing.json, schema_of({"$ref": "#/components/schemas/ErrorBody"}))
