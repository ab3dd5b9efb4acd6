"""Texts that a model of random logits writes under a grammar, through the scheduler."""

import functools
import tempfile
from pathlib import Path

import numpy as np

from export.checkpoints.checkpoint import open_checkpoint
from export.fetch import DOWNLOADS, fetch
from export.stage import ROOT
from runtime.artifact.manifest import TokenizerSpec
from runtime.decoding.options import SamplingOptions
from runtime.scheduling.requests import Failed, Generated, Request
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings
from runtime.text.grammar import GrammarCompiler
from runtime.text.stream import with_text
from runtime.text.token_bytes import TokenBytes
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.fake_slot_model import FakeSlotModel, SimulatedClock
from tests.helpers.mistral_tokenizers import open_both

CLOSING = ('"', '",', '":', '"}', "}", "]", "},", '"]', ",", ":", "}]")
PROMPT = (5, 6, 7)


@functools.cache
def smollm2_tokenizer():
    """The tokenizer of the demo's model, as a compile stores it."""
    path = fetch(DOWNLOADS["demo"], ROOT / "out" / "downloads")
    source = open_checkpoint(path, "gguf", {}).tokenizer
    with tempfile.TemporaryDirectory() as folder:
        assert source.kind == "tokenizer.json"
        (Path(folder) / "tokenizer.json").write_bytes(source.data)
        spec = TokenizerSpec(
            kind="tokenizer.json",
            file="tokenizer.json",
            bos_id=source.bos_id,
            add_bos=source.add_bos,
            eos_ids=source.eos_ids,
        )
        return open_tokenizer(spec, Path(folder))


@functools.cache
def compiler_of(name):
    """The compiler of grammars for a file of `mistral_tokenizers.FILES`, or of SmolLM2's tokenizer."""
    tokenizer = smollm2_tokenizer() if name == "smollm2" else open_both(name)[0]
    words = next(size for size in range(2**20) if tokenizer.token_text(size) is None)
    return GrammarCompiler(tokenizer, words + 64)  # as of a matrix of embeddings with rows that have no token


@functools.cache
def token_bytes(name):
    return TokenBytes(compiler_of(name).tokenizer, compiler_of(name).vocab_size)


@functools.cache
def biases(name):
    """Biases by which random logits often end a string, an object or a text."""
    compiler = compiler_of(name)
    ids = (compiler.tokenizer.encode("x" + text, add_bos=False)[-1] for text in CLOSING)
    thoughts = [token_id for token_id, control in compiler.tokenizer.dividers.items() if control == "[THINK]"]
    return {**dict.fromkeys(ids, 9.0), **dict.fromkeys(compiler.eos_ids, 9.0), **dict.fromkeys(thoughts, -100.0)}


def drawn(name, grammar, *, seed=0, choices=1, max_tokens=400, speculate=False, repeats=0.0, options=None):
    """The steps of each choice, with their texts, and the scheduler.

    `repeats` lets the next token depend mostly on the last one, so that a text repeats itself.
    """
    compiler = compiler_of(name)
    options = options or SamplingOptions(temperature=1.0, seed=seed, logit_bias=biases(name))
    clock = SimulatedClock()
    model = FakeSlotModel(
        vocab=compiler.vocab_size,
        repeats=repeats,
        cache_len=max_tokens + len(PROMPT),
        step_rows=(1, 2, 4, 8),
        clock=clock,
        seconds=lambda kind, size, rows: 1.0,
    )
    scheduler = Scheduler(model, SchedulerSettings(speculate=speculate), clock)
    request = Request(
        "a", PROMPT, max_tokens, options, eos_ids=compiler.eos_ids, logprobs=2, choices=choices, grammar=grammar
    )
    scheduler.submit(request)
    steps = [[] for _ in range(choices)]
    while scheduler.has_work:
        for event in scheduler.turn():
            assert not isinstance(event, Failed), event.error
            if isinstance(event, Generated):
                steps[event.choice].append(event.step)
    return [list(with_text(iter(one), compiler.tokenizer.text_stream(()))) for one in steps], scheduler


def text_of(steps):
    return "".join(step.text for step in steps)


def walk(compiler, grammar, seed, most=300):
    """Ids that are drawn evenly from what the grammar allows, without a model; the last one ends the text."""
    random = np.random.default_rng(seed)
    constraint = grammar.begin()
    ids = []
    while len(ids) < most and not (ids and ids[-1] in compiler.eos_ids):
        mask = constraint.allowed()
        ids.append(int(random.choice(np.flatnonzero(mask) if mask is not None else compiler.vocab_size)))
        constraint.append(ids[-1])
    return ids
