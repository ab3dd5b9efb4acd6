"""The tokenizer_config.json of a checkpoint, and the chat template in it."""

import json
from functools import partial
from pathlib import Path

from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, place
from tests.fuzz.tiny_files import CHATML, TOKENIZER_CONFIG, box_tokenizer, opened, write_huggingface

NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CHATML}]
CHANGES = ({}, {"chat_template": CHATML}, {"chat_template": NAMED})


def open_reader(folder: Path) -> Reader:
    write_huggingface(folder / "checkpoint")
    (folder / "artifact").mkdir()
    seeds = [json.dumps(TOKENIZER_CONFIG | change).encode() for change in CHANGES]
    absurd = (*ABSURD, "{%", "{{ 9**(9**9) }}", "<s>", "[INST]", {"content": "<s>"})
    known = {"a lone surrogate": json.dumps(TOKENIZER_CONFIG | {"chat_template": "\ud800"}).encode()}
    return Reader(seeds, partial(spoil_json, absurd=absurd), partial(check, folder), known)


def check(folder: Path, data: bytes) -> None:
    place(folder / "checkpoint" / "tokenizer_config.json", data)
    box_tokenizer(opened(folder / "checkpoint", "huggingface"), folder / "artifact")
