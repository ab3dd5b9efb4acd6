"""Generation far past the window.

The tokens are those of transformers, memory stays constant, and every step sees equally many columns.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from runtime.artifact.caches import RING_BLOCK
from runtime.bench import Workload, measure, step_bytes_of, weight_bytes
from runtime.decoding.options import SamplingOptions
from runtime.engines.engine import Engine, Row
from runtime.engines.side_by_side import SideBySide
from runtime.scheduling.completions import completions
from tests.helpers.artifacts import CACHE_LEN, WINDOW, column_of, random_ids, rings_of

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
    opened.rewind(0, 0)
    return opened


@pytest.fixture(scope="module")
def reference(case):
    model = MistralForCausalLM.from_pretrained(case.folder / "checkpoint", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def steps_of(engine, prompt, max_tokens):
    return [step for _, step in completions(engine, [prompt], SamplingOptions(), max_tokens=max_tokens, eos_ids=())]


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
from runtime.decoding.options import SamplingOptions
from runtime.scheduling.completions import completions
from runtime.scheduling.settings import SchedulerSettings

settings = SchedulerSettings(speculate=False)  # guessing keeps an index of the text
engine, window, windows = Engine.open(Path(sys.argv[1]), threads=1), int(sys.argv[2]), int(sys.argv[3])
resident = [0] * (windows + 1)
for count, _ in enumerate(\
completions(
    engine, [[1]], SamplingOptions(), max_tokens=windows * window, eos_ids=(), settings=settings), 1):
    if count % window == 0:
        lines = Path("/proc/self/status").read_text().splitlines()
        resident[count // window] = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
print(json.dumps([len(engine.tokens(0)), resident]))
"""


def test_memory_does_not_grow_past_the_second_window(case, engine):
    """Memory stays level up to the fourth window, and up to the 512th.

    The 512th is checked as well because two windows of a tiny model are fewer bytes than an allocator rounds by. The
    bound is one arena of Python's allocator (1 MiB), the unit in which memory comes for the ids of the history (36
    bytes each, 144 KiB in all). A cache that kept every column would grow by twice as much.
    """
    # bytes of one position's keys and values
    column = sum(ring.nbytes // ring.shape[2] for ring in rings_of(engine))
    bound = 2**20
    assert (FAR - 2) * WINDOW * column > 1.9 * bound
    command = [sys.executable, "-c", LONG_GENERATION, str(case.artifact), str(WINDOW), str(FAR)]
    position, resident = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert position == FAR * WINDOW
    assert 1024 * (max(resident[windows] for windows in (3, 4, FAR // 2, FAR)) - resident[2]) < bound


def seen_columns(engine, i, token_id):
    """Number of columns of one ring that count in the next step, besides the one that it writes.

    A large number in such a column changes the logits; a weight of zero leaves nothing of it. The engine is left as it
    was.
    """
    rings = rings_of(engine)
    before = [ring.copy() for ring in rings]

    def logits():
        found = engine.step([Row(0, token_id)])
        engine.rewind(0, len(engine.tokens(0)) - 1)
        return found

    clean = logits()
    seen = 0
    for column in range(rings[i].shape[2]):
        for ring, old in zip(rings, before, strict=True):
            ring[...] = old
        column_of(rings, i, column)[...] = 1e6
        seen += not np.array_equal(logits(), clean)
    for ring, old in zip(rings, before, strict=True):
        ring[...] = old
    return seen


def test_each_step_sees_as_many_columns_once_the_window_is_full(engine):
    """At position p, a step sees min(p, W - 1) past keys and values in each layer, besides its own.

    A ring has more, so that a call may write several columns before its rows attend.
    """
    rings = rings_of(engine)
    assert {ring.shape[2] for ring in rings} == {2 * RING_BLOCK} != {WINDOW}
    for position, token_id in enumerate(random_ids(5 * WINDOW, VOCAB, 1)):
        found = [seen_columns(engine, i, token_id) for i in range(len(rings))]
        assert found == [min(position, WINDOW - 1)] * len(rings), position
        engine.step([Row(0, token_id)])


def test_bench_decodes_from_contexts_beyond_the_window(engine):
    """No context is skipped, and from a full window on, every step has the same number of bytes to read."""
    contexts = (WINDOW // 2, WINDOW, WINDOW + 1, 5 * WINDOW, CACHE_LEN + 1, FAR)
    manifest = engine.manifest
    weights = weight_bytes(manifest.weights, tied=manifest.model.tied_embeddings)
    speeds = measure(
        SideBySide(engine, 1),
        VOCAB,
        Workload((), contexts, steps=2, repeats=1),
        step_bytes_of(manifest),
    )
    assert speeds.skipped == ()
    assert [speed.context for speed in speeds.decode] == list(contexts)
    full = weights + sum(WINDOW * ring.nbytes // ring.shape[2] for ring in rings_of(engine))
    assert [speed.bytes_per_step < full for speed in speeds.decode] == [True] + [False] * 5
    assert {speed.bytes_per_step for speed in speeds.decode[1:]} == {full}
