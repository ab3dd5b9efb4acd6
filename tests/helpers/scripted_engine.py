"""A stand-in for `runtime.engines.engine` that gives scripted replies and records what it was fed."""

import importlib.resources
import types

import numpy as np
import sentencepiece

import runtime.engines.engine
from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError

VOCAB = 32768
EOS = 2
MISTRAL_V3 = importlib.resources.files("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"
PIECES = sentencepiece.SentencePieceProcessor(model_proto=MISTRAL_V3.read_bytes())
SPEC = TokenizerSpec(kind="sentencepiece", file="tokenizer.model", bos_id=1, add_bos=True, eos_ids=(0, EOS))


class ScriptedEngine:
    """Each prefill begins the next reply of the script; `on_decode(n)` is called in the n-th decode after it."""

    def __init__(self, replies, *, cache_len=None, batch=1, on_prefill=lambda: None, on_decode=lambda _n: None):
        self.replies = iter(replies)
        self.cache_len, self.batch = cache_len, batch
        self.on_prefill, self.on_decode = on_prefill, on_decode
        self.fed = []  # contents of the caches
        self.prefills = []
        self.resets = 0

    @property
    def position(self):
        return len(self.fed)

    def room(self):
        return None if self.cache_len is None else self.cache_len - len(self.fed)

    def reset(self):
        self.fed = []
        self.resets += 1

    def prefill(self, prompts):
        (ids,) = prompts
        if self.cache_len is not None and len(ids) > self.room():
            raise UserError(f"the prompt has {len(ids)} tokens, expected at most {self.room()}")
        self.prefills.append(list(ids))
        self.on_prefill()
        self.fed += ids
        self.reply = next(self.replies)
        self.said = 0
        return self._logits()

    def decode(self, ids):
        assert list(ids) == [self.reply[self.said]]  # greedy: the id chosen by the last logits
        self.on_decode(self.said + 1)
        self.fed += ids
        self.said += 1
        return self._logits()

    def _logits(self):
        logits = np.zeros((1, VOCAB), np.float32)
        logits[0, self.reply[self.said]] = 10
        return logits


def write_tokenizer(folder):
    """Put Mistral's v3 tokenizer where `SPEC` expects it."""
    (folder / "tokenizer.model").write_bytes(MISTRAL_V3.read_bytes())


def install(monkeypatch, folder, engine, spec=SPEC):
    """Make `runtime.engines.engine.Engine.open` return `engine`.

    The artifact of `engine` is `folder`, with Mistral's v3 tokenizer.
    """
    write_tokenizer(folder)
    engine.folder = folder
    engine.manifest = types.SimpleNamespace(
        tokenizer=spec, model=types.SimpleNamespace(head="causal_lm", vocab_size=VOCAB)
    )

    def open_engine(artifact, *, threads=None, minimum_build=0):
        assert artifact == folder
        engine.threads = threads
        return engine

    monkeypatch.setattr(runtime.engines.engine.Engine, "open", open_engine)
