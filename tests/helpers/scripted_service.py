"""A served model whose replies are scripted, with Mistral's v3 tokenizer and instruct format."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, VOCAB, ScriptedEngine, write_tokenizer
from tests.helpers.serving import served


@cache
def v3_tokenizer():
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return open_tokenizer(SPEC, Path(folder))


def call_ids(text='[{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdef123"}]'):
    """Ids of a reply that calls tools."""
    return [v3_tokenizer().control_tokens["[TOOL_CALLS]"], *PIECES.encode(text), EOS]


def scripted(*replies, head="causal_lm", **engine):
    """What opens a model that gives these replies, one for each prompt that is fed: texts, or ids as they are."""
    ids = [[*PIECES.encode(reply), EOS] if isinstance(reply, str) else reply for reply in replies]
    model = ScriptedEngine(ids, **engine)
    config = SimpleNamespace(generates=head == "causal_lm", head=head, vocab_size=VOCAB)
    model.manifest = SimpleNamespace(model=config)
    opened = served(model, v3_tokenizer(), InstructEncoder("v3", v3_tokenizer()))
    return lambda: opened
