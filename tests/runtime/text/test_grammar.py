"""Grammars, compiled: what they allow, what is refused and where, and the bytes that tokens stand for."""

import builtins
import json
import threading

import numpy as np
import pytest

from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.grammar import MOST_DIGITS, GrammarCompiler
from runtime.text.grammar_source import DEEPEST, JSON_OBJECT, LONGEST, JsonSchema, LarkGrammar, Regex
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.grammar_texts import compiler_of, smollm2_tokenizer, token_bytes, walk
from tests.helpers.mistral_tokenizers import open_both

TOKENIZERS = ("v1", "v3", "v13-tekken", "smollm2")


def compiled(name, source):
    return compiler_of(name).compile("start: @answer", {"answer": source})


def accepts(name, source, text):
    """Whether a text, in the tokens of the tokenizer, is a whole text of the grammar."""
    compiler = compiler_of(name)
    constraint = compiled(name, source).begin()
    ids = token_bytes(name)(text.encode())
    for token_id in ids:
        if not constraint.allowed()[token_id]:
            # of text that is not a choice, only the usual tokens are allowed
            return False
        constraint.append(token_id)
    return bool(constraint.allowed()[list(compiler.eos_ids)].all())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_every_token_are_its_text(name):
    tokenizer = smollm2_tokenizer() if name == "smollm2" else open_both(name)[0]
    before = tokenizer.encode("x", add_bos=False)
    start = tokenizer.decode(before)
    checked = 0
    for token_id in range(compiler_of(name).vocab_size):
        data = tokenizer.token_bytes(token_id)
        if data is None:
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        assert tokenizer.decode([*before, token_id]) == start + text
        checked += 1
    assert checked > 20_000 - 1000
    pieces = tokenizer.encode("naïve 日本語 🐟", add_bos=False)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in pieces).decode().strip() == "naïve 日本語 🐟"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_become_the_ids_that_the_tokenizer_gives_them(name):
    compiler = compiler_of(name)
    tokens = token_bytes(name)
    for text in (
        '{"name": "',
        "temperature",
        "  spaced  ",
        "日本語",
        "\n\n",
        "x\n",
        '"größe"',
        "\ufb01ligature",
        "\x00",
    ):
        ids = tokens(text.encode())
        assert b"".join(tokens.tokens[token_id] for token_id in ids) == text.encode()
    usual = compiler.tokenizer.encode(" temperature" if not compiler.tokenizer.drops_first_space else "temperature")
    assert tokens(b" temperature") == [token_id for token_id in usual if token_id != compiler.tokenizer.spec.bos_id]
    part = "日".encode()[:2]
    assert b"".join(tokens.tokens[token_id] for token_id in tokens(part)) == part


def test_only_a_tokenizer_with_a_space_of_its_own_drops_the_first_one():
    assert [compiler_of(name).tokenizer.drops_first_space for name in TOKENIZERS] == [True, True, False, False]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_json_has_little_whitespace(name):
    schema = JsonSchema({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}})
    assert accepts(name, schema, '{"a":[1,2]}')
    assert accepts(name, schema, '{"a": [1, 2]}')
    assert accepts(name, schema, '{"a":\n[1,\n2]}')
    for loose in ('{"a":  [1]}', '{ "a":[1]}', '{"a":[1 ]}', '{"a":[1]} ', '{"a":[ 1]}', '{"a":[1, \n2]}'):
        assert not accepts(name, schema, loose)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("schema", [{"type": "number"}, {"type": "integer"}, {"type": "array"}, {"type": "object"}])
def test_no_number_is_endless(name, schema):
    """A model that always takes a digit comes to an end of it, with and without drafts."""
    constraint = compiled(name, JsonSchema(schema)).begin()
    begin = {"array": "[1", "object": '{"a":1'}.get(schema["type"], "1")
    ids = token_bytes(name)(begin.encode())
    (one,) = token_bytes(name)(b"1")
    for token_id in ids:
        constraint.append(token_id)
    assert constraint.permitted([one] * 100) == MOST_DIGITS - 1
    assert not constraint.allowed([one] * (MOST_DIGITS - 1))[one]
    for _ in range(MOST_DIGITS - 1):
        assert constraint.allowed()[one]
        constraint.append(one)
    mask = constraint.allowed()
    assert not mask[one]
    assert mask.any()


def test_digits_in_a_string_or_a_pattern_are_as_many_as_they_should_be():
    long = "7" * (3 * MOST_DIGITS)
    for name in ("v3", "v13-tekken"):
        assert accepts(name, JsonSchema({"type": "string"}), json.dumps(long))
        assert accepts(name, JsonSchema({"type": "string", "pattern": "^7{120}$"}), json.dumps(long))
        assert accepts(name, Regex("7+"), long)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_mask_depends_on_the_tokens_alone(name):
    """Asked for with drafts, before, after and without them, by texts that share a grammar."""
    compiler = compiler_of(name)
    grammar = compiled(name, JsonSchema({"type": "object", "properties": {"a": {"enum": ["xy", "xz", 3]}}}))
    for seed in range(5):
        ids = walk(compiler, grammar, seed, most=60)
        masks = []
        constraint = grammar.begin()
        for token_id in ids:
            masks.append(constraint.allowed())
            constraint.append(token_id)
        text = [token_id for token_id in ids if token_id not in compiler.eos_ids]
        for start in range(0, len(text), 4):
            other = grammar.begin()
            for token_id in text[:start]:
                other.append(token_id)
            for drafts in range(min(8, len(text) - start)):
                assert other.permitted(text[start : start + drafts]) == drafts
                assert (other.allowed(text[start : start + drafts]) == masks[start + drafts]).all()
                assert (other.allowed() == masks[start]).all()


def test_control_tokens_and_ids_without_a_token_are_never_allowed():
    for name in TOKENIZERS:
        compiler = compiler_of(name)
        constraint = compiled(name, JsonSchema({"type": "string"})).begin()
        (quote,) = token_bytes(name)(b'"')
        constraint.append(quote)
        mask = constraint.allowed()
        assert mask.size == compiler.vocab_size
        assert not mask[-64:].any()
        assert not mask[list(compiler.tokenizer.control_tokens.values())].any()
        assert not mask[list(compiler.tokenizer.dividers)].any()


def test_the_end_is_only_an_id_that_ends_a_text(tmp_path):
    compiler = compiler_of("v3")
    spec = TokenizerSpec(**{**_fields(compiler.tokenizer.spec), "eos_ids": (2, 4)})
    (tmp_path / spec.file).write_bytes(compiler.tokenizer._library._path.read_bytes())
    several = GrammarCompiler(open_tokenizer(spec, tmp_path), compiler.vocab_size)
    constraint = several.compile("start: @answer", {"answer": Regex("yes|yes, it is")}).begin()
    (yes,) = compiler.tokenizer.encode("yes", add_bos=False)
    assert not constraint.allowed()[[2, 4]].any()
    constraint.append(token_bytes("v3")(b"yes")[0])
    assert constraint.allowed()[[2, 4]].all()
    assert constraint.permitted([4]) == 0
    constraint.append(4)
    assert np.flatnonzero(constraint.allowed()).tolist() == [2, 4]
    assert constraint.permitted([yes]) == 0


def _fields(spec):
    return {name: getattr(spec, name) for name in spec.__struct_fields__}


REFUSED = [
    (JsonSchema({"type": "objekt"}), "the JSON schema at # cannot be used: Invalid type: objekt"),
    (
        JsonSchema(
            {"properties": {"a": {"items": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(?=x)"}]}}}}
        ),
        "the JSON schema at #/properties/a/items/anyOf/1 cannot be used: regex parse error",
    ),
    (
        JsonSchema({"$defs": {"a": {"type": "nil"}}, "items": {"$ref": "#/$defs/a"}}),
        "the JSON schema at #/$defs/a cannot be used: Invalid type: nil",
    ),
    (JsonSchema({"items": {"$ref": "#/$defs/none"}}), "cannot be used: Pointer '/$defs/none' does not exist"),
    (JsonSchema({"uniqueItems": True, "type": "array"}), 'cannot be used: Unimplemented keys: ["uniqueItems"]'),
    (JsonSchema({"enum": []}), "Unsatisfiable schema"),
    (JsonSchema({"$ref": "https://example.com/schema"}), "is not present in a registry"),
    (JsonSchema({"description": "x" * LONGEST}), f"bytes, expected at most {LONGEST}; shorten it"),
    (JsonSchema({"items": {"minItems": 10**9}}), "maxProperties to 1e+09 in all, expected at most 10000; lower"),
    (JsonSchema({"type": "array", "maxItems": 1e9}), "the JSON schema brings minItems, maxItems,"),
    (
        JsonSchema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        "the text cannot go on under its grammar",
    ),
    (LarkGrammar('start: %json {"minItems": 1000000000}'), "the grammar has a JSON schema within it"),
    (Regex("(a"), "the regular expression cannot be used: at 1(8): invalid regex"),
    (Regex("a" * (LONGEST + 1)), f"the regular expression has {LONGEST + 1} bytes"),
    (LarkGrammar("start: missing"), "the grammar cannot be used: at 1(8): unknown name"),
    (LarkGrammar("start: /a(/"), "the grammar cannot be used: at 1(8): invalid regex"),
    (LarkGrammar("begin: /a/"), "the grammar cannot be used: no start rule found"),
    (LarkGrammar(""), "the grammar cannot be used"),
]


@pytest.mark.parametrize(("source", "sentence"), REFUSED)
def test_what_cannot_be_used_is_refused_with_its_place(source, sentence):
    with pytest.raises(UserError) as error:
        compiled("v3", source)
    assert sentence in str(error.value)


def test_a_schema_may_not_be_nested_too_deeply():
    schema = {}
    for _ in range(DEEPEST // 2 - 1):
        schema = {"anyOf": [schema]}
    compiled("v3", JsonSchema(schema))
    for _ in range(10_000):
        schema = {"items": schema}
    with pytest.raises(UserError, match="nested more than 64 levels deep"):
        compiled("v3", JsonSchema(schema))


def test_a_grammar_that_becomes_too_complex_fails_with_a_sentence():
    pattern = "^(([a-z]{1,50}){1,50}x){1,50}$"
    grammar = compiled("v3", JsonSchema({"type": "string", "pattern": pattern}))
    with pytest.raises(UserError, match="the text cannot go on under its grammar: lexer error"):
        walk(compiler_of("v3"), grammar, 0)
    again = compiled("v3", JsonSchema({"type": "string", "pattern": pattern}))
    assert again.begin().allowed().any(), "a grammar that is compiled again is not to blame"


def test_objects_may_have_many_optional_properties():
    schema = {"type": "object", "properties": {f"property_{i}": {"type": "boolean"} for i in range(300)}}
    ids = walk(compiler_of("v3"), compiled("v3", JsonSchema(schema)), 0, most=50)
    assert len(ids) == 50 or ids[-1] in compiler_of("v3").eos_ids


def test_a_token_that_is_not_allowed_is_an_error_of_the_next_mask():
    constraint = compiled("v3", Regex("yes")).begin()
    constraint.append(5)
    assert constraint.permitted([6]) == 0
    with pytest.raises(UserError, match="the text cannot go on under its grammar"):
        constraint.allowed()


def test_grammars_compile_and_run_in_other_threads():
    texts = []

    def run():
        grammar = compiled("v3", JSON_OBJECT)
        texts.append(walk(compiler_of("v3"), grammar, 1, most=20))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4
    assert all(text == texts[0] for text in texts)


def test_without_the_package_there_is_one_sentence(monkeypatch):
    tokenizer = compiler_of("v3").tokenizer
    known = builtins.__import__

    def without(name, *rest):
        if name == "llguidance":
            raise ImportError(name)
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package llguidance, which is not installed"):
        GrammarCompiler(tokenizer, 32768)


def test_a_tokenizer_of_whole_words_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec(kind="tokenizer.json", file="tokenizer.json", bos_id=None, add_bos=False, eos_ids=(2,))
    with pytest.raises(UserError, match="a decoder of the kind none, whose tokens do not stand for bytes"):
        GrammarCompiler(open_tokenizer(spec, tmp_path), 3)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = compiler_of("v3").tokenizer
    with pytest.raises(UserError, match="needs a token that ends a text"):
        GrammarCompiler(tokenizer, 2)
