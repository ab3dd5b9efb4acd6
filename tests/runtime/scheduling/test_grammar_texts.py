"""What is drawn under a grammar: every text keeps to it, and speculation changes nothing."""

import json
import re

import jsonschema
import pytest

from runtime.decoding.reply_grammar import ReplyGrammars, ReplyRules
from runtime.text.grammar_source import JSON_OBJECT, JsonSchema, LarkGrammar, Regex
from tests.helpers.grammar_texts import compiler_of, drawn, text_of

TOKENIZERS = ("v1", "v3", "v11-tekken", "v13-tekken", "smollm2")
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]}
SCHEMAS = {
    "empty object": {"type": "object", "properties": {}, "additionalProperties": False},
    "string": {"type": "string"},
    "short string": {"type": "string", "maxLength": 5},
    "long string": {"type": "string", "minLength": 20, "maxLength": 30},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "number": {"type": "number"},
    "integer": {"type": "integer"},
    "integer with bounds": {"type": "integer", "minimum": -17, "maximum": 230},
    "number with bounds": {"type": "number", "minimum": 0.25, "exclusiveMaximum": 3},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "enum": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "words in unicode": {"enum": ["naïve", "日本語", "🐟 fish", 'a "quote" \\ and\nline']},
    "key in unicode": {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]},
    "constant": {"const": {"kind": "fixed", "n": [1, 2.5]}},
    "array": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    "array of at least": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 4},
    "nested arrays": {"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 3}},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "integer"}],
        "items": False,
        "minItems": 2,
    },
    "optional properties": {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in "abcd"},
        "required": ["c"],
        "additionalProperties": False,
    },
    "nested objects": {
        "type": "object",
        "properties": {"from": POINT, "to": POINT, "name": {"type": "string", "maxLength": 8}},
        "required": ["from", "to", "name"],
        "additionalProperties": False,
    },
    "any of": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 4}, POINT]},
    "one of": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "r": {"type": "number"}},
                "required": ["kind", "r"],
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "square"}, "a": {"type": "integer"}},
                "required": ["kind", "a"],
            },
        ]
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "several types": {"type": ["integer", "null", "boolean"]},
    "definitions": {
        "$defs": {"point": POINT},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "minItems": 1,
        "maxItems": 2,
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "date": {"type": "string", "format": "date"},
    "more properties": {"type": "object", "additionalProperties": {"type": "integer"}},
    "property patterns": {
        "type": "object",
        "patternProperties": {"^n_[a-c]$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "anything": {},
    "notes": {"title": "A", "description": "B", "default": 3, "examples": [4], "type": "integer", "$id": "urn:a"},
}


def checked(name, source, whole, **options):
    """The texts of some choices, with and without speculation, all of which are whole and equal."""
    compiler = compiler_of(name)
    grammar = ReplyGrammars(compiler, None).compile(ReplyRules(answer=source))
    plain, _ = drawn(name, grammar, choices=2, **options)
    guessed, scheduler = drawn(name, grammar, choices=2, speculate=True, **options)
    assert plain == guessed, "steps, log probabilities and all"
    for steps in plain:
        assert steps[-1].finish_reason == "stop", text_of(steps)
        whole(text_of(steps))
    return scheduler


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", ["v3", "smollm2"])
def test_every_text_under_a_schema_is_valid(name, schema):
    validator = jsonschema.Draft202012Validator(SCHEMAS[schema])
    checked(name, JsonSchema(SCHEMAS[schema]), lambda text: validator.validate(json.loads(text)), seed=1)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("schema", ["nested objects", "tree", "words in unicode", "one of", "number"])
def test_every_tokenizer_writes_valid_texts(name, schema):
    validator = jsonschema.Draft202012Validator(SCHEMAS[schema])
    checked(name, JsonSchema(SCHEMAS[schema]), lambda text: validator.validate(json.loads(text)), seed=7)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_object_is_json(name):
    def whole(text):
        assert isinstance(json.loads(text), dict)

    checked(name, JSON_OBJECT, whole, seed=3)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_regular_expression_and_a_grammar_hold_for_the_whole_text(name):
    def regex(text):
        assert re.fullmatch(r"(yes|no), [a-f]{2,9}\.", text)

    def grammar(text):
        assert set(text) <= set("(x")
        assert text.endswith("x")

    checked(name, Regex(r"(yes|no), [a-f]{2,9}\."), regex, seed=5)
    checked(name, LarkGrammar('start: "(" start | "x" | "x" start'), grammar, seed=5)


def test_drafts_are_checked_under_a_grammar():
    """A text that repeats itself, so that there are drafts, of which the grammar forbids some."""

    def whole(text):
        assert re.fullmatch(r"(abc[01]){20,30}", text)

    scheduler = checked("v3", Regex(r"(abc[01]){20,30}"), whole, seed=2)
    assert scheduler.statistics.drafts_accepted > 20
