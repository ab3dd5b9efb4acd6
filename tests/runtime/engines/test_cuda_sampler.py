"""Steps that draw their own ids, compared with ids drawn by the host.

The CUDA kernels run in their serial form, with a stand-in for the CUDA runtime.
"""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.artifact.consistency import LIBRARY_FILE, WEIGHTS_FILE
from runtime.artifact.manifest import Graph, Signature, TensorSpec
from runtime.artifact.tensor_file import TensorFile
from runtime.bench import Workload, measure
from runtime.decoding.generation import generate
from runtime.decoding.options import GREEDY, SamplingOptions
from runtime.decoding.sampler import Sampler
from runtime.engines import cuda
from runtime.engines.cuda_function import GraphFunction
from runtime.engines.cuda_memory import CudaMemory
from runtime.engines.cuda_sampler import CudaSampler
from runtime.engines.engine import Engine
from runtime.engines.loaded_artifact import LoadedArtifact
from runtime.engines.tvm_runtime import CPU_DEVICE, start_machine
from runtime.errors import UserError
from runtime.verify import verify
from tests.helpers.artifacts import WINDOW, Case, exported, random_ids
from tests.helpers.drivers import stub_runtime
from tests.helpers.serial import HostDevice, ReplayMemory, compile_serial, serial_engine

SLOTS = 24
FULL = Case({"sliding_window": None, "num_hidden_layers": 1}, {"shape": {"prefill_chunk": 6, "cache_len": SLOTS}})
SAMPLED = SamplingOptions(temperature=0.8, top_k=7, seed=3)
OPTIONS = [GREEDY, SAMPLED, SamplingOptions(temperature=1.5, seed=1)]


@pytest.fixture
def library(tmp_path):
    return stub_runtime(tmp_path)


@pytest.fixture(scope="module", params=["windowed", "full"])
def engines(request, compile_case, tmp_path_factory):
    """An engine that draws as a GPU does, and one whose host draws; both have the same kernels."""
    folder = tmp_path_factory.mktemp(request.param)
    graphs = (
        exported("full", folder / "case", FULL)[1] if request.param == "full" else compile_case(request.param).graphs
    )
    manifest = compile_serial(graphs, folder)
    device = HostDevice(ReplayMemory(stub_runtime(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "start_machine", lambda library, *_: start_machine(library, CPU_DEVICE))
        loaded = cuda.load_library(
            device, manifest, folder / LIBRARY_FILE, TensorFile.open(folder / WEIGHTS_FILE).map()
        )
    return SimpleNamespace(
        device=Engine(manifest, folder, loaded), host=serial_engine(manifest, folder), full=request.param == "full"
    )


def steps(engine, prompt, options, max_tokens=SLOTS, eos_ids=()):
    return [
        (step.token_id, step.finish_reason)
        for step in generate(engine, prompt, Sampler(options), max_tokens=max_tokens, eos_ids=eos_ids)
    ]


def prompt_of(engine, length=5, seed=0):
    return random_ids(length, engine.manifest.model.vocab_size, seed)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_device_draws_what_the_host_does(engines, options):
    """Generate far past the window; with full attention, up to the last slot.

    After that slot, the step that is started ahead would have none.
    """
    found = []
    for engine in (engines.device, engines.host):
        engine.reset()
        found.append(
            steps(engine, prompt_of(engine), options, max_tokens=3 * WINDOW if not engines.full else 2 * SLOTS)
        )
        assert engine.position == 5 + len(found[0]) - 1
    assert engines.device.can_draw(options)
    assert not engines.host.can_draw(options)
    assert found[0] == found[1]
    assert len({token_id for token_id, _ in found[0]}) > 3
    assert engines.device.room() == (0 if engines.full else None)


def test_a_sequence_goes_on_after_an_end(engines):
    """At an end of sequence, one more step is in flight.

    Its column and its draw do not count, and the next prompt takes its place.
    """
    found = []
    for engine in (engines.device, engines.host):
        engine.reset()
        first = steps(engine, prompt_of(engine), SAMPLED, max_tokens=6)
        engine.reset()
        sampler = Sampler(SAMPLED)
        ended = list(generate(engine, prompt_of(engine), sampler, max_tokens=SLOTS, eos_ids=(first[3][0],)))
        assert ended[-1].finish_reason == "stop"
        position = engine.position
        found.append(
            (ended, position, list(generate(engine, prompt_of(engine, 4, seed=1), sampler, max_tokens=6, eos_ids=())))
        )
    assert found[0] == found[1]


def test_a_model_is_given_back_at_once(library):
    """The model is freed at once, not when a collector finds a reference cycle: the next model may need the memory."""
    spec = TensorSpec(name="x", shape=(1, 1), dtype="int64")
    device = HostDevice(CudaMemory(library))
    signature = Signature(inputs=(spec, spec), outputs=(TensorSpec(name="logits", shape=(1, 1, 9), dtype="float32"),))
    output = device.tensor(signature.outputs[0])
    gc.disable()
    try:
        weights = set()
        decode = GraphFunction(
            device, lambda *_: output, Graph(name="decode", tokens=1, signature=signature), [weights]
        )
        draws = CudaSampler(device, decode, lambda *_: None)
        for _ in range(3):
            decode()
            draws.start(1.0, 1, 0.0)
            draws.finish()
        alive = [weakref.ref(decode), weakref.ref(draws)]
        del decode, draws
        assert [one() for one in alive] == [None, None]
    finally:
        gc.enable()


def test_whoever_leaves_early_leaves_a_sound_engine(engines):
    engine = engines.device
    engine.reset()
    ids = generate(engine, prompt_of(engine), Sampler(GREEDY), max_tokens=9, eos_ids=())
    taken = [next(ids).token_id for _ in range(3)]
    ids.close()
    assert engine.position == 5 + 2
    engines.host.reset()
    logits = engines.host.prefill([[*prompt_of(engine), *taken]])
    np.testing.assert_allclose(engine.decode(taken[-1:]), logits, atol=1e-5)


def test_other_filters_stay_with_the_host(engines):
    assert not any(
        engines.device.can_draw(SamplingOptions(temperature=1.0, **one))
        for one in ({"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1})
    )


def test_it_verifies_itself(engines, monkeypatch):
    checks = verify(engines.device)
    assert [check.check for check in checks if not check.ok] == []
    assert checks[-1].check == "ids that the device draws"
    assert verify(engines.host)[-1].check != "ids that the device draws"
    finish = CudaSampler.finish
    for wrong in (0, -1):
        monkeypatch.setattr(CudaSampler, "finish", lambda self, wrong=wrong: min(0, finish(self)) + wrong)
        assert [check.check for check in verify(engines.device) if not check.ok] == ["ids that the device draws"]


def test_the_benchmark_times_drawn_steps(engines, monkeypatch):
    monkeypatch.setattr(engines.device, "decode", None)
    speeds = measure(
        engines.device, engines.device.manifest.model.vocab_size, Workload((4,), (4,), steps=3, repeats=1), lambda _: 1
    )
    assert speeds.decode[0].step_s > 0


class Scripted:
    """`runtime.engines.loaded_artifact.DeviceSampler` that logs the requests made to it."""

    def __init__(self, drawn):
        self.drawn = drawn
        self.log = []

    def begin(self, token_id, position):
        self.log.append(("begin", token_id, position))

    def start(self, temperature, top_k, draw):
        self.log.append(("start", temperature, top_k, draw))

    def finish(self):
        self.log.append("finish")
        return self.drawn.pop(0)

    def abandon(self):
        self.log.append("abandon")


def scripted(engines, drawn):
    draws = Scripted(drawn)
    return draws, Engine(engines.host.manifest, engines.host.folder, LoadedArtifact({}, {}, [], draws))


def test_one_step_is_started_ahead_and_none_beyond_the_last(engines):
    draws, engine = scripted(engines, [4, 5, 6])
    assert list(engine.draw(3, Sampler(GREEDY), 3)) == [4, 5, 6]
    start = ("start", 1.0, 1, 0.0)
    assert draws.log == [("begin", 3, 0), start, start, "finish", start, "finish", "finish", "abandon"]
    assert engine.position == 3


def test_one_that_is_left_lying_does_not_disturb_the_next(engines):
    draws, engine = scripted(engines, [4, 5, 6, 7])
    first = engine.draw(3, Sampler(GREEDY), 9)
    assert next(first) == 4
    second = engine.draw(4, Sampler(GREEDY), 9)
    assert next(second) == 5
    assert list(first) == []
    assert draws.log.count("abandon") == 0
    assert next(second) == 6
    second.close()
    assert draws.log[-1] == "abandon"


def test_draws_that_were_not_used_are_given_again():
    ahead, plain = Sampler(SAMPLED), Sampler(SAMPLED)
    taken = [ahead.device_options() for _ in range(3)]
    ahead.take_back(taken[1:])
    assert [taken[0], *(ahead.device_options() for _ in range(3))] == [plain.device_options() for _ in range(4)]
    greedy = Sampler(GREEDY)
    greedy.take_back([greedy.device_options()])
    assert greedy.device_options() == (1.0, 1, 0.0) == Sampler(SamplingOptions(temperature=1e-46)).device_options()


def test_logits_that_are_no_numbers_end_it(engines):
    draws, engine = scripted(engines, [4, -1, 0])
    with pytest.raises(UserError, match="logits hold nan or infinity"):
        list(engine.draw(3, Sampler(GREEDY), 3))
    assert draws.log[-1] == "abandon"
    assert engine.position == 1
