"""Generation far past the window.

The tokens are those of transformers, memory stays constant, and every step visits equally many keys.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from runtime.bench import Workload, cache_bytes, measure, weight_bytes
from runtime.decoding.generation import generate
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import Sampler
from runtime.engines.engine import Engine
from tests.helpers.artifacts import CACHE_LEN, WINDOW, random_ids, slot_of

VOCAB = 320
FAR = 512  # windows: enough for any memory that each step kept to show in the process


@pytest.fixture(scope="module")
def case(compile_case):
    return compile_case("windowed")


@pytest.fixture(scope="module")
def opened(case):
    return Engine.open(case.artifact, threads=2)


@pytest.fixture
def engine(opened):
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def reference(case):
    model = MistralForCausalLM.from_pretrained(case.folder / "checkpoint", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def steps_of(engine, prompt, max_tokens):
    return generate(engine, prompt, Sampler(SamplingOptions()), max_tokens=max_tokens, eos_ids=())


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
def test_four_windows_past_the_window_are_those_of_transformers(engine, reference, length):
    prompt = random_ids(length, VOCAB, length)
    count = max(WINDOW - length, 0) + 4 * WINDOW
    given = torch.tensor([prompt])
    made = reference.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    found = [step.token_id for step in steps_of(engine, prompt, count)]
    assert found == made[0, length:].tolist()
    assert len(found) == count
    assert len(set(found)) > WINDOW  # not the same token forever, which any cache would give


# Resident memory not backed by files, in kB, after each window of a long generation, in a process where nothing else
# allocates.
LONG_GENERATION = """
import json, sys
from pathlib import Path
from runtime.engines.engine import Engine
from runtime.decoding.generation import generate
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import Sampler

engine, window, windows = Engine.open(Path(sys.argv[1]), threads=1), int(sys.argv[2]), int(sys.argv[3])
resident = [0] * (windows + 1)
for count, _ in enumerate(\
generate(engine, [1], Sampler(SamplingOptions()), max_tokens=windows * window, eos_ids=()), 1):
    if count % window == 0:
        lines = Path("/proc/self/status").read_text().splitlines()
        resident[count // window] = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
print(json.dumps([engine.position, resident]))
"""


def test_memory_does_not_grow_past_the_second_window(case, engine):
    """Memory stays level up to the fourth window, and up to the 512th.

    The 512th is checked as well because two windows of a tiny model are fewer bytes than an allocator rounds by. The
    bound is one arena of Python's allocator (1 MiB), the unit in which memory comes for the ids of the history (36
    bytes each, 144 KiB in all). A cache that kept every column would grow by twice as much.
    """
    column = sum(cache.nbytes for cache in engine.caches) // WINDOW  # bytes of one position's keys and values
    bound = 2**20
    assert (FAR - 2) * WINDOW * column > 1.9 * bound
    command = [sys.executable, "-c", LONG_GENERATION, str(case.artifact), str(WINDOW), str(FAR)]
    position, resident = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert position == FAR * WINDOW
    assert 1024 * (max(resident[windows] for windows in (3, 4, FAR // 2, FAR)) - resident[2]) < bound


def visited_slots(engine, i, token_id):
    """Number of slots of one cache that the next step reads.

    NaN in such a slot changes the logits; for a value it does so whatever the weight. The engine is left as it was.
    """
    ids = np.array([[token_id]])
    before = [array.copy() for array in engine.caches]
    clean = engine.step(1, ids, engine.lengths)
    visited = 0
    for slot in range(engine.caches[i].shape[2]):
        slot_of(engine.caches, i, slot)[...] = np.nan
        visited += not np.array_equal(engine.step(1, ids, engine.lengths), clean)
        for array, old in zip(engine.caches, before, strict=True):
            array[...] = old
    return visited


def test_each_step_visits_as_many_keys_once_the_window_is_full(engine):
    """At position p, a step reads min(p, W - 1) past keys and values in each layer, besides its own.

    So no step costs more than the W-th.
    """
    for position, token_id in enumerate(random_ids(5 * WINDOW, VOCAB, 1)):
        assert [visited_slots(engine, i, token_id) for i in range(len(engine.caches))] == [
            min(position, WINDOW - 1)
        ] * len(engine.caches), position
        engine.decode([token_id])
    assert all(cache.shape[2] == WINDOW for cache in engine.caches)


def test_bench_decodes_from_contexts_beyond_the_window(engine):
    """No context is skipped, and from a full window on, every step has the same number of bytes to read."""
    contexts = (WINDOW // 2, WINDOW, WINDOW + 1, 5 * WINDOW, CACHE_LEN + 1, FAR)
    manifest = engine.manifest
    weights = weight_bytes(manifest.weights, tied=manifest.model.tied_embeddings)
    speeds = measure(
        engine,
        VOCAB,
        Workload((), contexts, steps=2, repeats=1),
        lambda n: weights + cache_bytes(manifest.graphs[-1].signature.caches, n),
    )
    assert speeds.skipped == ()
    assert [speed.context for speed in speeds.decode] == list(contexts)
    full = weights + sum(cache.nbytes for cache in engine.caches)
    assert [speed.bytes_per_step < full for speed in speeds.decode] == [True] + [False] * 5
    assert {speed.bytes_per_step for speed in speeds.decode[1:]} == {full}
