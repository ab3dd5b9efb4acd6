"""Steps that draw their own ids, compared with ids drawn by the host.

The CUDA kernels run in their serial form, with a stand-in for the CUDA runtime.
"""

import gc
import weakref

import numpy as np
import pytest

from runtime.artifact.manifest import IDS, POSITIONS, SLOTS, Function, Signature, TensorSpec
from runtime.bench import Workload, measure
from runtime.decoding.options import GREEDY, SamplingOptions
from runtime.decoding.sampler import Sampler
from runtime.engines.cuda_function import GraphFunction
from runtime.engines.cuda_memory import CudaMemory
from runtime.engines.cuda_sampler import CudaSampler
from runtime.engines.engine import Engine, Row
from runtime.engines.host import HostCaches
from runtime.engines.loaded_artifact import LoadedArtifact
from runtime.engines.side_by_side import SideBySide
from runtime.errors import UserError
from runtime.verify import verify_draws
from tests.helpers.artifacts import WINDOW, random_ids
from tests.helpers.drivers import stub_runtime
from tests.helpers.feeding import emptied
from tests.helpers.serial import HostDevice

LONGEST = 24  # as many tokens as the caches of `conftest.py` hold
SAMPLED = SamplingOptions(temperature=0.8, top_k=7, seed=3)
OPTIONS = [GREEDY, SAMPLED, SamplingOptions(temperature=1.5, seed=1)]


@pytest.fixture
def library(tmp_path):
    return stub_runtime(tmp_path)


def drawn(engine, prompt, sampler, count, slot=0):
    """The ids after a prompt, drawn as `runtime.decoding` does: by the device if it can, otherwise by the host."""
    found = [sampler.sample(engine.feed(slot, prompt))]
    sampler.append(found[0])
    if engine.can_draw(sampler.options):
        return [*found, *engine.draw(slot, found[0], sampler, count - 1)]
    while len(found) < count:
        found.append(sampler.sample(engine.step([Row(slot, found[-1])])[0]))
        sampler.append(found[-1])
    return found


def prompt_of(engine, length=5, seed=0):
    return random_ids(length, engine.manifest.model.vocab_size, seed)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_device_draws_what_the_host_does(engines, options):
    """Far past the window; with full attention, up to the last column, behind which no step is started ahead."""
    found = []
    for slot, engine in ((2, engines.device), (0, engines.host)):
        emptied(engine)
        count = engine.manifest.shape.cache_len - 5 + 1 if engines.full else 3 * WINDOW
        found.append(drawn(engine, prompt_of(engine), Sampler(options), count, slot))
        assert len(engine.tokens(slot)) == 5 + count - 1
        assert engine.room(slot) == (0 if engines.full else None)
    assert engines.device.can_draw(options)
    assert not engines.host.can_draw(options)
    assert found[0] == found[1]
    assert len(set(found[0])) > 3


def test_a_sequence_goes_on_after_an_end(engines):
    """Whoever stops at some id leaves one step in flight; what it draws is not used, and the next ids take its place.

    Another slot may draw in between.
    """
    found = []
    for engine in (engines.device, engines.host):
        emptied(engine)
        sampler, prompt = Sampler(SAMPLED), prompt_of(engine)
        if engine.can_draw(SAMPLED):
            first = sampler.sample(engine.feed(1, prompt))
            sampler.append(first)
            ids = engine.draw(1, first, sampler, LONGEST - 5)
            ended = [first, next(ids), next(ids)]
            ids.close()
        else:
            ended = drawn(engine, prompt, sampler, 3, slot=1)
        assert len(engine.tokens(1)) == 5 + 2
        other = drawn(engine, prompt[:2], Sampler(SAMPLED), 4, slot=0)
        found.append((ended, other, drawn(engine, prompt_of(engine, 4, seed=1), sampler, 6, slot=1)))
    assert found[0] == found[1]


def test_another_call_ends_the_draws(engines):
    """It takes the inputs of the step that is in flight; what is drawn so far stays."""
    engine, prompt = emptied(engines.device), prompt_of(engines.device)
    engine.feed(2, prompt)
    ids = engine.draw(2, prompt[0], Sampler(GREEDY), 9)
    taken = [next(ids), next(ids)]
    logits = engine.step([Row(0, prompt[1])])
    assert list(ids) == []
    assert list(engine.tokens(2)) == [*prompt, prompt[0], taken[0]]
    other = emptied(engines.host)
    np.testing.assert_array_equal(logits, other.step([Row(0, prompt[1])]))
    other.feed(2, prompt)
    for token_id in (prompt[0], taken[0]):
        other.step([Row(2, token_id)])
    np.testing.assert_array_equal(engine.step([Row(2, taken[1])]), other.step([Row(2, taken[1])]))


def test_a_step_in_flight_takes_its_column(engines):
    """The column that it overwrites is lost, though its own does not count: no rewinding may need it."""
    found = []
    for engine in (engines.device, engines.host):
        prompt = prompt_of(emptied(engine), 15)
        sampler = Sampler(GREEDY)
        engine.feed(1, prompt)
        if engine.can_draw(GREEDY):
            ids = engine.draw(1, prompt[0], sampler, 8)
            taken = [next(ids) for _ in range(3)]
            ids.close()
        else:
            for token_id in (prompt[0], *taken[:2]):
                engine.step([Row(1, token_id)])
        least = engines.device.least_rewind(1)
        engine.rewind(1, least or 3)
        found.append(engine.step([Row(1, prompt[3])]))
    assert engines.full or least
    np.testing.assert_array_equal(*found)


def test_a_model_is_given_back_at_once(library):
    """The model is freed at once, not when a collector finds a reference cycle: the next model may need the memory."""
    inputs = tuple(TensorSpec(name=name, shape=(1,), dtype="int64") for name in (IDS, POSITIONS, SLOTS))
    device = HostDevice(library)
    device.memory = CudaMemory(library)  # whose graphs hold nothing
    signature = Signature(inputs=inputs, outputs=(TensorSpec(name="logits", shape=(1, 1, 9), dtype="float32"),))
    output = device.tensor(signature.outputs[0])
    gc.disable()
    try:
        weights = set()
        described = Function(name="step_1", rows=1, tokens=1, signature=signature)
        step = GraphFunction(device, lambda *_: output, described, [weights])
        draws = CudaSampler(device, step, lambda *_: None)
        for _ in range(3):
            step()
            draws.start(1.0, 1, 0.0)
            draws.finish()
        alive = [weakref.ref(step), weakref.ref(draws)]
        del step, draws
        assert [one() for one in alive] == [None, None]
    finally:
        gc.enable()


def test_other_filters_stay_with_the_host(engines):
    assert not any(
        engines.device.can_draw(SamplingOptions(temperature=1.0, **one))
        for one in (
            {"top_p": 0.9},
            {"min_p": 0.1},
            {"repetition_penalty": 1.1},
            {"presence_penalty": 0.1},
            {"frequency_penalty": 0.1},
            {"logit_bias": {1: 5.0}},
        )
    )


def test_it_verifies_itself(engines, monkeypatch):
    assert [check.check for check in verify_draws(SideBySide(engines.host, 1))] == []
    assert [(check.check, check.ok) for check in verify_draws(SideBySide(engines.device, 1))] == [
        ("ids that the device draws", True)
    ]
    finish = CudaSampler.finish
    for wrong in (0, -1):
        monkeypatch.setattr(CudaSampler, "finish", lambda self, wrong=wrong: min(0, finish(self)) + wrong)
        assert [check.ok for check in verify_draws(SideBySide(engines.device, 1))] == [False]


def test_the_benchmark_times_drawn_steps(engines, monkeypatch):
    engine = SideBySide(engines.device, 1)
    monkeypatch.setattr(engine, "decode", None)
    speeds = measure(engine, engine.manifest.model.vocab_size, Workload((4,), (4,), steps=3, repeats=1), lambda _: 1)
    assert speeds.decode[0].step_s > 0


class Scripted:
    """`runtime.engines.loaded_artifact.DeviceSampler` that logs the requests made to it."""

    def __init__(self, drawn):
        self.drawn = drawn
        self.log = []

    def begin(self, token_id, position, slot):
        self.log.append(("begin", token_id, position, slot))

    def start(self, temperature, top_k, draw):
        self.log.append(("start", temperature, top_k, draw))

    def finish(self):
        self.log.append("finish")
        return self.drawn.pop(0)

    def abandon(self):
        self.log.append("abandon")


def scripted(engines, drawn):
    draws = Scripted(drawn)
    return draws, Engine(engines.host.manifest, engines.host.folder, LoadedArtifact({}, HostCaches([]), draws))


def test_one_step_is_started_ahead_and_none_beyond_the_last(engines):
    draws, engine = scripted(engines, [4, 5, 6])
    assert list(engine.draw(1, 3, Sampler(GREEDY), 3)) == [4, 5, 6]
    start = ("start", 1.0, 1, 0.0)
    assert draws.log == [("begin", 3, 0, 1), start, start, "finish", start, "finish", "finish", "abandon"]
    assert list(engine.tokens(1)) == [3, 4, 5]


def test_one_that_is_left_lying_does_not_disturb_the_next(engines):
    draws, engine = scripted(engines, [4, 5, 6, 7])
    first = engine.draw(0, 3, Sampler(GREEDY), 9)
    assert next(first) == 4
    second = engine.draw(0, 4, Sampler(GREEDY), 9)
    assert next(second) == 5
    assert list(first) == []
    assert draws.log.count("abandon") == 0
    assert next(second) == 6
    second.close()
    assert draws.log[-1] == "abandon"


def test_draws_that_were_not_used_are_given_again():
    sampler, draws = Sampler(SAMPLED), np.random.Generator(np.random.PCG64(SAMPLED.seed)).random(5).tolist()
    assert [sampler.device_options(ahead) for ahead in range(3)] == [(0.8, 7, draw) for draw in draws[:3]]
    sampler.append(5)
    assert [sampler.device_options(ahead) for ahead in range(3)] == [(0.8, 7, draw) for draw in draws[1:4]]
    assert Sampler(GREEDY).device_options() == (1.0, 1, 0.0)
    assert Sampler(SamplingOptions(temperature=1e-46)).device_options() == (1.0, 1, 0.0)


def test_logits_that_are_no_numbers_end_it(engines):
    draws, engine = scripted(engines, [4, -1, 0])
    with pytest.raises(UserError, match="logits hold nan or infinity"):
        list(engine.draw(0, 3, Sampler(GREEDY), 3))
    assert draws.log[-1] == "abandon"
    assert len(engine.tokens(0)) == 1
