import json
import random
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf.vocab import MistralVocab
from mistral_common import __file__ as mistral_common_file
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from export.checkpoints.gguf.byte_level import SPLITTINGS, TEKKEN
from export.checkpoints.gguf.ends import END_NAMES, end_names
from export.checkpoints.gguf.tokenizer import recover
from runtime.errors import UserError
from runtime.text.chat_template import ChatTemplate

DATA = Path(mistral_common_file).parent / "data"
SENTENCEPIECE = DATA / "tokenizer.model.v1"
TEXTS = [
    "The capital of France is Paris.",
    "In 2024, 1234567890 + 42 = 3.14e-10",
    "emoji 🙂🏳️‍🌈 and naïve café, 東京, Ελλάδα\n\n\ttabs   spaces  ",
    "I'm you're WE'VE it's don't aaaaa===== ...,,,",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " leading",
    "½ and x² of Ⅷ or ٣٤, a1b22 333\r\n\r\n// CamelCaseAndSNAKE_CASE",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PREFIX = "tokenizer.ggml."


def keys(**changes: Any) -> dict[str, object]:
    return {f"tokenizer.ggml.{key}": value for key, value in changes.items() if value is not ...}


def sentencepiece_keys(**changes: Any) -> dict[str, object]:
    """The keys of a Mistral with SentencePiece; `...` leaves one out."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(SENTENCEPIECE.read_bytes())
    found = {
        "model": "llama",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return keys(**(found | changes)) | {"tokenizer.chat_template": "T"}


def byte_keys(**changes: Any) -> dict[str, object]:
    """The keys of a small byte-level BPE: three control tokens, the bytes, and two merged tokens."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "hel"]
    found = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "merges": ["h e", "he l"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return keys(**(found | changes))


def with_tokens(found: dict[str, object], *more: tuple[str, int]) -> dict[str, object]:
    """The keys with more tokens of the given types at the end."""
    extended = {
        "tokenizer.ggml.tokens": [token for token, _ in more],
        "tokenizer.ggml.token_type": [kind for _, kind in more],
        "tokenizer.ggml.scores": [-1000.0 for _ in more],
    }
    return found | {key: [*found[key], *added] for key, added in extended.items() if key in found}


def ids(source, text: str) -> list[int]:
    return Tokenizer.from_buffer(source.data).encode(text, add_special_tokens=False).ids


# --- Byte-level BPE


@pytest.fixture(scope="module")
def tekken(tmp_path_factory) -> Path:
    """Mistral's own tokenizer with the first 20,000 tokens of its vocabulary."""
    folder = tmp_path_factory.mktemp("tekken")
    file = json.loads((DATA / "tekken_240911.json").read_text())
    file["config"]["default_vocab_size"] = 20_000
    (folder / "tekken.json").write_text(json.dumps(file))
    return folder


def random_texts() -> list[str]:
    draw = random.Random(0)
    alphabets = ["abcdeABC 123'\n\t.,é東🙂ß", "aA=- \n.0", "".join(map(chr, [*range(0x20, 0x7F), *range(0xA0, 0x180)]))]
    return ["".join(draw.choices(draw.choice(alphabets), k=draw.randrange(1, 60))) for _ in range(2000)]


def test_tekken_is_that_of_mistral_common(tekken):
    """The header is the one that llama.cpp's converter writes, by the package gguf: every way to split a token."""
    theirs, vocab = Tekkenizer.from_file(tekken / "tekken.json"), MistralVocab(tekken)
    tokens = list(vocab.all_tokens())
    ours = recover(
        keys(
            model=vocab.gguf_tokenizer_model,
            pre="tekken",
            tokens=[text.decode() for text, _, _ in tokens],
            token_type=[int(kind) for _, _, kind in tokens],
            merges=vocab.extract_vocab_merges_from_model(),
            bos_token_id=vocab.bos_id,
            eos_token_id=vocab.eos_id,
        ),
        "x",
    )
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (theirs.bos_id, (theirs.eos_id,), True)
    rebuilt = Tokenizer.from_buffer(ours.data)
    rebuilt.encode_special_tokens = True
    for text in TEXTS + random_texts():
        expected = theirs.encode(text, bos=False, eos=False)
        assert rebuilt.encode(text, add_special_tokens=False).ids == expected
        assert rebuilt.decode(expected) == text
    assert ids(ours, "[INST]hi[/INST]</s>")[-1] == theirs.eos_id


@pytest.mark.parametrize("pre", sorted(set(GGUF_PRE_TOKENIZER_SPLITS).intersection(SPLITTINGS)))
def test_texts_are_split_as_transformers_splits_them(pre):
    theirs = TEKKEN if pre == "pixtral" else GGUF_PRE_TOKENIZER_SPLITS[pre]  # see the next test
    assert SPLITTINGS[pre].patterns == (theirs,)


def test_pixtral_is_split_as_mistral_common_splits_it():
    """llama.cpp and transformers follow a tokenizer.json with the pattern of Llama 3, which the model never had."""
    assert json.loads((DATA / "tekken_240911.json").read_text())["config"]["pattern"] == TEKKEN


# The patterns of llama.cpp for what transformers has none for.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_CPP = {
    **{pre: [WORDS] for pre in ("gpt-2", "mellum", "trillion")},
    **{pre: [r"\p{N}", WORDS] for pre in ("smollm", "starcoder", "refact", "command-r", "minerva-7b")},
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
}


def split_in_turn(patterns: list[str], text: str) -> list[str]:
    """The pieces that a text is cut into: what a pattern matches, and what lies between."""
    pieces = [text]
    for pattern in patterns:
        cut = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[end : match.start()], match[0]]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


@pytest.mark.parametrize("pre", sorted(set(SPLITTINGS) - set(GGUF_PRE_TOKENIZER_SPLITS)))
def test_texts_are_split_as_llama_cpp_splits_them(pre):
    rebuilt = Tokenizer.from_buffer(recover(byte_keys(pre=pre), "x").data)
    for text in TEXTS + random_texts()[:300]:
        split = rebuilt.pre_tokenizer.pre_tokenize_str(text)
        assert [text[begin:end] for _, (begin, end) in split] == split_in_turn(LLAMA_CPP[pre], text)


def test_a_whole_word_that_no_merge_reaches():
    """It is found where llama.cpp looks words up before it merges, and only there."""
    word = [("hey", NORMAL)]
    assert ids(recover(with_tokens(byte_keys(pre="llama-bpe"), *word), "x"), "hey") == [261]
    assert len(ids(recover(with_tokens(byte_keys(pre="smaug-bpe"), *word), "x"), "hey")) == 2


@pytest.mark.parametrize(("pre", "said", "expected"), [("tekken", ..., True), ("gpt-2", ..., False)])
def test_bos_follows_from_the_split(pre, said, expected):
    assert recover(byte_keys(pre=pre, add_bos_token=said), "x").add_bos is expected
    assert recover(byte_keys(pre=pre, add_bos_token=not expected), "x").add_bos is not expected


def test_eos_after_a_whole_text():
    assert recover(byte_keys(), "x").end_id is None
    assert recover(byte_keys(add_eos_token=True), "x").end_id == 2


# --- SentencePiece


def test_sentencepiece_model_is_rebuilt():
    ours = recover(sentencepiece_keys(), "x")
    assert (ours.kind, ours.bos_id, ours.eos_ids, ours.add_bos) == ("sentencepiece", 1, (2,), True)
    assert ours.chat_template == "T"
    check_sentencepiece(ours.data)


def check_sentencepiece(data: bytes) -> None:
    """The model encodes and decodes as the original one does."""
    theirs, rebuilt = SentencePieceProcessor(model_file=str(SENTENCEPIECE)), SentencePieceProcessor(model_proto=data)
    for text in TEXTS:
        found = theirs.encode(text)
        assert rebuilt.encode(text) == found
        assert rebuilt.decode(found) == theirs.decode(found)
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (1, 2, 0, -1)
    assert [i for i in range(len(theirs)) if rebuilt.is_control(i)] == [1, 2]


def types(*first: int) -> list[int]:
    """The types of the original pieces, but for the first ones."""
    return [*first, *sentencepiece_keys()["tokenizer.ggml.token_type"][len(first) :]]


@pytest.mark.parametrize(
    "changes",
    [
        {"token_type": types(NORMAL)},
        {"token_type": types(CONTROL)},
        {"token_type": types(NORMAL), "unknown_token_id": 0},
        {"token_type": types(CONTROL), "unknown_token_id": 2},  # the end of a text, as some fine-tunes have it
        {"token_type": types(UNKNOWN, UNKNOWN, CONTROL)},
        {"token_type": types(UNKNOWN, CONTROL, UNKNOWN), "unknown_token_id": 0},
        {"token_type": types(UNKNOWN), "unknown_token_id": 2},
        {"token_type": ...},
        {"token_type": ..., "unknown_token_id": 0},
        {"bos_token_id": ..., "eos_token_id": ...},
        {"unknown_token_id": 40_000, "padding_token_id": 2**32 - 1},
    ],
)
def test_the_unknown_token_is_found(changes):
    ours = recover(sentencepiece_keys(**changes), "x")
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))
    check_sentencepiece(ours.data)


# --- Tokens of both kinds


@pytest.mark.parametrize("header", [sentencepiece_keys, byte_keys])
def test_padding_tokens(header):
    """More embeddings than tokens, tokens that pad, and tokens without a name or with another's."""
    size = len(header()["tokenizer.ggml.tokens"])
    padded = with_tokens(header(), (f"[PAD{size}]", UNUSED), ("", UNUSED), ("</s>", CONTROL), ("", CONTROL))
    for rows in (size + 64, size + 4, None):
        ours = recover(padded, "x", rows)
        assert ours.eos_ids == (2,)
        # Both tokens without a name have one now; a tokenizer.json lists control tokens a second time.
        assert ours.data.count(b"[EMPTY_") == (2 if ours.kind == "sentencepiece" else 3)
    unused_alone = with_tokens(header(), ("[PAD1]", UNUSED), ("[PAD2]", UNUSED))
    assert recover(unused_alone, "x", size).data == recover(header(), "x", size).data


@pytest.mark.parametrize("header", [sentencepiece_keys, byte_keys])
def test_special_tokens_beyond_the_embeddings(header):
    size = len(header()["tokenizer.ggml.tokens"])
    found = with_tokens(header(), ("[PAD1]", UNUSED))
    padded = recover(found | {"tokenizer.ggml.padding_token_id": size}, "x", size)
    assert padded.special_tokens == recover(header(), "x", size).special_tokens
    with pytest.raises(UserError, match=f"names the special token {size} as .*eos_token_id, expected an id below"):
        recover(found | {"tokenizer.ggml.eos_token_id": size}, "x", size)


@pytest.mark.parametrize("header", [sentencepiece_keys, byte_keys])
@pytest.mark.parametrize(
    ("more", "rows", "said"),
    [
        ([("a", NORMAL)], None, "has the token 'a' twice, with the ids"),
        ([("</s>", USER_DEFINED)], None, "has the token '</s>' twice, with the ids 2 and"),
        ([("zzq", NORMAL)], -1, "expected none but unused tokens beyond the embeddings"),
    ],
)
def test_tokens_that_do_not_fit(header, more, rows, said):
    found = with_tokens(header(), *more)
    with pytest.raises(UserError, match=said):
        recover(found, "x", rows and len(found["tokenizer.ggml.tokens"]) + rows)


@pytest.mark.parametrize("header", [sentencepiece_keys, byte_keys])
@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_a_turn_ends_at_the_names_that_llama_cpp_knows(header, kind):
    size = len(header()["tokenizer.ggml.tokens"])
    found = with_tokens(header(), ("<|im_start|>", CONTROL), ("<|im_end|>", kind), ("<|tool|>", CONTROL))
    ours = recover(found, "x")
    assert ours.eos_ids == (2, size + 1)
    if ours.kind == "sentencepiece":
        assert SentencePieceProcessor(model_proto=ours.data).is_control(size + 1)
    else:
        assert ids(ours, "hel<|im_end|>") == [260, size + 1]
        assert Tokenizer.from_buffer(ours.data).decode([260, size + 1], skip_special_tokens=True) == "hel"


def test_the_ends_that_the_header_names_come_first():
    named = {"eos_token_id": 5, "eot_token_id": 9, "eom_token_id": 7, "fim_pad_token_id": 11}
    assert recover(byte_keys(**named), "x").eos_ids == (5, 9, 7, 11, 2)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (END_NAMES, set(END_NAMES) - {"<|end|>", "</s>"}),
        (("<|end|>", "</s>", "a"), {"<|end|>", "</s>"}),
        (("<|end|>", "<|return|>"), {"<|end|>", "<|return|>"}),
        (("<|end|>", "<|return|>", "<|call|>"), {"<|return|>", "<|call|>"}),
        (("<|end|>", "<|flush|>", "<|calls|>"), {"<|flush|>", "<|calls|>"}),
        (("</s>", "<|tool_response>"), {"<|tool_response>"}),
        (("</S>", "<|im_end |>", "im_end"), set()),
    ],
)
def test_names_that_end_a_text(tokens, expected):
    assert set(end_names(tokens)) == expected


@pytest.mark.parametrize("kind", [NORMAL, UNUSED])
def test_tokens_of_bytes_are_known_by_their_names(kind):
    types = [kind if token_type == BYTE else token_type for token_type in sentencepiece_keys()[f"{PREFIX}token_type"]]
    ours = SentencePieceProcessor(model_proto=recover(sentencepiece_keys(token_type=types), "x").data)
    theirs = SentencePieceProcessor(model_proto=SENTENCEPIECE.read_bytes())
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.decode(theirs.encode("\U00010348")) == "\U00010348"


def test_a_vocabulary_without_bytes_has_the_unknown_token_in_their_place():
    found = sentencepiece_keys()
    kept = [i for i, kind in enumerate(found[f"{PREFIX}token_type"]) if kind != BYTE]
    lists = {key: [found[PREFIX + key][i] for i in kept] for key in ("tokens", "scores", "token_type")}
    ours = SentencePieceProcessor(model_proto=recover(sentencepiece_keys(**lists), "x").data)
    assert ours.decode(ours.encode("The capital")) == "The capital"
    assert 0 in ours.encode("\U00010348")
    lists = {key: [*values[:-1], found[PREFIX + key][3]] for key, values in lists.items()}
    with pytest.raises(
        UserError, match="has 1 of the 256 tokens of bytes, expected all from <0x00> to <0xFF>, or none"
    ):
        recover(sentencepiece_keys(**lists), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "has tokenizer.ggml.model: 'bert', which is not supported; expected one of gpt2, llama"),
        ({"model": 7}, "has tokenizer.ggml.model: 7, which is not supported"),
        ({"tokens": [1]}, "has a malformed tokenizer: Expected `str`"),
        ({"token_type": [1]}, "has 32000 tokens and types for 1 of them"),
        ({"token_type": [7] * 32000}, "has a token of the unknown type 7"),
        ({"scores": []}, "has 32000 tokens and 0 scores"),
        ({"scores": ...}, "has 32000 tokens and 0 scores"),
        (
            {"token_type": [NORMAL] * 32000, "tokens": ["<x>", *sentencepiece_keys()["tokenizer.ggml.tokens"][1:]]},
            "has no unknown token",
        ),
        ({"bos_token_id": 40000}, "names the special token 40000 as tokenizer.ggml.bos_token_id, expected an id below"),
        ({"eom_token_id": -1}, "names the special token -1 as tokenizer.ggml.eom_token_id"),
    ],
)
def test_bad_tokenizers(changes, message):
    with pytest.raises(UserError, match=message):
        recover(sentencepiece_keys(**changes), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "klingon"}, "has tokenizer.ggml.pre: 'klingon', which is not supported; expected one of tekken, "),
        ({"pre": ...}, "has tokenizer.ggml.pre: None"),
        ({"merges": ["qqq zzz"]}, "has merges that do not fit its tokens"),
        ({"merges": ...}, "lacks tokenizer.ggml.merges, which say how bytes become tokens"),
        (
            {"pre": "tekken", "bos_token_id": ...},
            "puts a token before every text, but lacks tokenizer.ggml.bos_token_id",
        ),
        ({"add_bos_token": True, "bos_token_id": ...}, "puts a token before every text, but lacks"),
        ({"pre": "tekken", "token_type": [CONTROL] * 261}, "has the control token '.+', which is one word"),
    ],
)
def test_bad_byte_level_tokenizers(changes, message):
    with pytest.raises(UserError, match=message):
        recover(byte_keys(**changes), "x")


def test_no_tokenizer():
    assert recover({"general.architecture": "llama"}, "x") is None


def test_a_template_of_its_own_for_tools():
    of_tools = {"tokenizer.chat_template.tool_use": "{{ tools[0].function.name }}"}
    template = ChatTemplate(recover(sentencepiece_keys() | of_tools, "x").chat_template, {})
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert (template.render([]), template.render([], tools=tools)) == ("T", "add")
    with pytest.raises(UserError, match=r"has tokenizer\.chat_template\.tool_use: 3, expected a text; convert"):
        recover(sentencepiece_keys() | {"tokenizer.chat_template.tool_use": 3}, "x")
