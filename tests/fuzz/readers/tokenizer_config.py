"""The tokenizer_config.json of a checkpoint: its chat template, and tokens that it adds to a tokenizer."""

import json
from functools import partial
from pathlib import Path

from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, place
from tests.fuzz.tiny_files import (
    CHATML,
    TOKENIZER_CONFIG,
    box_tokenizer,
    json_tokenizer,
    opened,
    sentencepiece_model,
    write_huggingface,
)

FOLDERS = ("checkpoint", "pieces")
NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CHATML}]
PIECES = sentencepiece_model(261)  # with as many tokens as the tokenizer.json, so that one id fits both
SIZE = json_tokenizer().get_vocab_size()
FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
ADDED = {"1": {"content": "<s>", **FLAGS}, str(SIZE): {"content": "<tool>", **FLAGS}}
CHANGES = (
    {},
    {"chat_template": CHATML},
    {"chat_template": NAMED},
    {"added_tokens_decoder": ADDED, "extra_special_tokens": ["<tool>"], "legacy": False},
)


def open_reader(folder: Path) -> Reader:
    for name in FOLDERS:
        write_huggingface(folder / name)
    (folder / "pieces" / "tokenizer.json").unlink()
    (folder / "pieces" / "tokenizer.model").write_bytes(PIECES.SerializeToString())
    (folder / "artifact").mkdir()
    seeds = [json.dumps(TOKENIZER_CONFIG | change).encode() for change in CHANGES]
    absurd = (*ABSURD, "{%", "{{ 9**(9**9) }}", "<s>", "[INST]", {"content": "<s>"})
    known = {
        "a lone surrogate": json.dumps(TOKENIZER_CONFIG | {"chat_template": "\ud800"}).encode(),
        "an id of 5000 digits": json.dumps({"added_tokens_decoder": {"1" * 5000: {"content": "x"}}}).encode(),
    }
    return Reader(seeds, partial(spoil_json, absurd=absurd), partial(check, folder), known)


def check(folder: Path, data: bytes) -> None:
    for name in FOLDERS:
        place(folder / name / "tokenizer_config.json", data)
        box_tokenizer(opened(folder / name, "huggingface"), folder / "artifact")
