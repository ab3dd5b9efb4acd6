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
    """A `SlotModel` in which each prompt begins the next reply of the script.

    `on_prefill()` is called before a prompt is fed, `on_step(n)` before the n-th step after it.
    """

    same_bits_in_any_call = True
    step_rows = (1,)  # no row is left for guesses
    chunks = (2**15,)

    def __init__(self, replies, *, cache_len=None, slots=1, on_prefill=lambda: None, on_step=lambda _n: None):
        self.replies = iter(replies)
        self.cache_len, self.slots = cache_len, slots
        self.on_prefill, self.on_step = on_prefill, on_step
        self.held = [[] for _ in range(slots)]
        self.saying = [[] for _ in range(slots)]  # what is left of each slot's reply
        self.steps = 0
        self.prompts = []
        self.prefills = []  # what was fed of each prompt

    @property
    def fed(self):
        return self.held[0]

    def tokens(self, slot):
        return self.held[slot]

    def room(self, slot):
        return None if self.cache_len is None else self.cache_len - len(self.held[slot])

    def least_rewind(self, _slot):
        return 0

    def rewind(self, slot, length):
        del self.held[slot][length:]

    def can_draw(self, _options):
        return False

    def prefill(self, slot, ids):
        if self.cache_len is not None and len(ids) > self.room(slot):
            raise UserError(f"the prompt has {len(ids)} tokens, expected at most {self.room(slot)}")
        self.on_prefill()
        self.prefills.append(list(ids))
        self.held[slot] += ids
        self.prompts.append(list(self.held[slot]))
        self.saying[slot] = list(next(self.replies))
        self.steps = 0
        return self._logits(slot)

    def step(self, rows):
        ((slot, token_id),) = rows
        if self.saying[slot][:1] != [token_id]:  # the end of a prompt
            return self.prefill(slot, [token_id])[None]
        self.steps += 1
        self.on_step(self.steps)
        self.held[slot].append(token_id)
        del self.saying[slot][0]
        return self._logits(slot)[None]

    def _logits(self, slot):
        logits = np.zeros(VOCAB, np.float32)
        logits[self.saying[slot][0]] = 100
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
