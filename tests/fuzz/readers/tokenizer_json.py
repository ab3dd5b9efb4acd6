"""A Hugging Face tokenizer.json, from the checkpoint to the box; a text must have the same ids each time."""

import json
from functools import partial
from pathlib import Path

from runtime.text.tokenizer import open_tokenizer
from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.readers.tekken_json import PATTERNS
from tests.fuzz.tiny_files import box_tokenizer, json_tokenizer, opened, write_huggingface

TEXTS = (
    "",
    "abc ab  cab",
    "naïve 東京 🙂\n\n",
    "<s>[INST] hi </s>",
    "I'll\t12345",
    "a" * 3000,
    "ab " * 500,
    "\0\ufeff",
)

# Parts that the seed does not have; each is put in its place and spoiled there.
PADDING = {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "<unk>"}  # fmt: skip
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
SPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
NORMALIZERS = (
    {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b" * 1000},
)  # fmt: skip
GROWING = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 3,
}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def open_reader(folder: Path) -> Reader:
    write_huggingface(folder / "checkpoint")
    (folder / "artifact").mkdir()
    plain = json.loads(json_tokenizer().to_str())
    words = {"type": "WordLevel", "vocab": plain["model"]["vocab"], "unk_token": "<unk>"}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [[name, -1.0] for name in plain["model"]["vocab"]]}
    changes = [
        {}, {"padding": PADDING}, {"truncation": TRUNCATION}, {"pre_tokenizer": SPACE}, {"post_processor": TEMPLATE},
        {"model": {**plain["model"], "dropout": 0.5}}, {"model": words}, {"model": unigram},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": False}},
        *({"normalizer": normalizer} for normalizer in NORMALIZERS),
    ]  # fmt: skip
    known = {
        "dropout": plain | {"model": {**plain["model"], "dropout": 0.5}},
        "padding to 2^40": plain | {"padding": {**PADDING, "strategy": {"Fixed": 2**40}}},
        "padding to a multiple of 0": plain | {"padding": {**PADDING, "pad_to_multiple_of": 0}},
        "truncation to 0 with a stride": plain | {"truncation": {**TRUNCATION, "max_length": 0, "stride": 9}},
        "a token of 2^31": plain
        | {"added_tokens": [*plain["added_tokens"], {**plain["added_tokens"][0], "id": 2**31, "content": "[X]"}]},
        "an empty token": plain
        | {"added_tokens": [*plain["added_tokens"], {**plain["added_tokens"][0], "id": 290, "content": ""}]},
        "a text that grows": plain | {"normalizer": GROWING},
        "a damaged table of characters": plain
        | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
    }
    seeds = [json.dumps(plain | change).encode() for change in changes]
    absurd = (*ABSURD, *PATTERNS, "<s>", "</s>", "▁", "first", "always", "never", 0.5)
    return Reader(
        seeds,
        partial(spoil_json, absurd=absurd),
        partial(check, folder),
        {name: json.dumps(data).encode() for name, data in known.items()},
    )


def check(folder: Path, data: bytes) -> None:
    place(folder / "checkpoint" / "tokenizer.json", data)
    spec = box_tokenizer(opened(folder / "checkpoint", "huggingface"), folder / "artifact")
    demand(spec is not None, "the tokenizer is left out")
    tokenizer = open_tokenizer(spec, folder / "artifact")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        demand(all(type(i) is int and i >= 0 for i in ids), "ids below 0")
        demand(all(tokenizer.encode(text) == ids for _ in range(3)), "a text has other ids the next time")
        demand(type(tokenizer.decode(ids)) is str, "no text")
