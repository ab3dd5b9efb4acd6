"""The rival's loop must compute what ours computes, or its speed would mean nothing; and the figures that are printed must follow from the rounds."""

import numpy as np
import pytest

from build.bench import OnnxruntimeEngine, Result
from runtime.engine import Engine
from runtime.verify import relative_bound

STEPS = 20  # past the window of 8 and, with the longest prompt, past two chunks


@pytest.mark.parametrize("name", ["windowed", "fp16"])
@pytest.mark.parametrize("prompt", [1, 5, 16, 17])
def test_onnxruntime_loop_gives_the_logits_of_the_engine(compile_case, name, prompt):
    case = compile_case(name)
    ours, theirs = Engine.open(case.artifact, threads=2), OnnxruntimeEngine(case.graphs, 2)
    rng = np.random.default_rng(prompt)
    vocab_size = ours.manifest.model.vocab_size
    for _ in range(2):  # the second time with stale caches
        ours.reset()
        theirs.reset()
        ids = rng.integers(vocab_size, size=(ours.batch, prompt)).tolist()
        check(theirs.prefill(ids), ours.prefill(ids), ours.manifest)
        for _ in range(STEPS):
            step = rng.integers(vocab_size, size=ours.batch).tolist()
            check(theirs.decode(step), ours.decode(step), ours.manifest)
    assert theirs.position == ours.position == prompt + STEPS


def check(found, expected, manifest):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative_bound(manifest) * np.abs(expected).max()


def test_room_is_that_of_the_engine(compile_case):
    case = compile_case("int8")
    ours, theirs = Engine.open(case.artifact, threads=1), OnnxruntimeEngine(case.graphs, 1)
    for engine in (ours, theirs):
        engine.prefill([[1, 2, 3], [4, 5, 6]])
    assert ours.room() == theirs.room() == 37
    print(np.abs(ours.decode([1, 2]) - theirs.decode([1, 2])).max(), np.abs(ours.decode([1, 2])).max(), relative_bound(ours.manifest))
    assert 0


RESULTS = [
    Result("ours", "fp32", 100.0, {64: 30.0, 512: 20.0}, 16.0),
    Result("ours", "int8", 110.0, {64: 75.0, 512: 50.0}, 11.0),
    Result("onnxruntime", "fp32", 90.0, {64: 20.0, 512: 10.0}, 10.0),
    Result("onnxruntime", "int8", 80.0, {64: 5.0, 512: 4.0}, 1.0),
]
