"""Mistral's tekken.json; what becomes of it must encode as Mistral's own software does."""

import base64
import json
from functools import partial
from pathlib import Path

from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from safetensors.numpy import save_file

from runtime.text.tokenizer import open_tokenizer
from tests.fuzz.limits import start_clock
from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.tiny_files import MISTRAL, box_tokenizer, opened, tekken_file, tensors, write_mistral

TEXTS = ("", "abc ab  cab", "naïve 東京 🙂\n\n", "<s>[INST] hi </s>", "I'll\t12345")
PATTERNS = (
    ".", "", "(", "(?=", "(a+)+$", "(.*)*(.*)*(.*)*x", "\\p{L}+|.", "(?<!a)b", "[^\\s\\S]", "\\1", "(?R)", "a{99999}",
    "((a{1000}){1000}){1000}", "(?:" * 3000 + ")" * 3000,
)  # fmt: skip


def open_reader(folder: Path) -> Reader:
    checkpoint = write_mistral(folder / "checkpoint")
    save_file(tensors(MISTRAL), checkpoint / "consolidated.safetensors")
    (folder / "artifact").mkdir()
    seed = tekken_file()
    many, few = json.loads(json.dumps(seed)), json.loads(json.dumps(seed))
    many["config"]["default_num_special_tokens"] = 2**31
    many["config"]["default_vocab_size"] += 2**31
    few["config"]["default_vocab_size"] = 2**63
    known = {"2^31 special tokens": json.dumps(many).encode(), "2^63 tokens": json.dumps(few).encode()}
    for number, pattern in enumerate(PATTERNS):
        known[f"pattern {number}"] = json.dumps({**seed, "config": {**seed["config"], "pattern": pattern}}).encode()
    absurd = (*ABSURD, *PATTERNS, "v1", "v3", "v11", "YWI=", base64.b64encode(b"ab" * 20_000).decode())
    pattern = seed["config"]["pattern"]
    spoil = partial(spoil_json, absurd=absurd)
    return Reader([json.dumps(seed).encode()], spoil, partial(check, folder, pattern), known)


def check(folder: Path, pattern: str, data: bytes) -> None:
    path = place(folder / "checkpoint" / "tekken.json", data)
    spec = box_tokenizer(opened(folder / "checkpoint", "mistral"), folder / "artifact")
    demand(spec is not None, "the tokenizer is left out")
    ours = open_tokenizer(spec, folder / "artifact")
    encoded = [ours.encode(text, add_bos=False) for text in TEXTS]
    start_clock()
    try:
        theirs = Tekkenizer.from_file(path)
        comparable = json.loads(data)["config"]["pattern"] == pattern  # the libraries' regular expressions differ
    except Exception:  # it refuses other files than we do
        return
    if not comparable:
        return
    demand(encoded == [theirs.encode(text, bos=False, eos=False) for text in TEXTS], "other ids than Mistral's own")
