"""Golden prompts: computed with one layer's weights at a time, they equal those of the whole model and onnxruntime."""

import shutil

import numpy as np
import pytest

from build.shipping.golden import add_golden
from export.golden import SHORT, golden_prompts, prompt_lengths, write_golden
from export.proof.steppers import TorchStepper
from runtime.artifact.folder import Artifact
from runtime.artifact.golden import read_golden
from runtime.engines.engine import Engine
from runtime.engines.side_by_side import SideBySide
from runtime.errors import UserError
from runtime.verify import replay
from tests.helpers import reference
from tests.helpers.artifacts import CASES, bound, effective_weights, onnx_shifted, static_model


@pytest.fixture(scope="module", params=CASES)
def case(request, compile_case):
    return compile_case(request.param)


@pytest.fixture(scope="module")
def prompts(case):
    return golden_prompts(case.graphs)


def test_the_long_prompt_crosses_the_window_and_all_fits(case, prompts):
    record = case.graphs.record
    lengths, steps = prompt_lengths(record.model, record.shape)
    assert [len(prompt.ids) for prompt in prompts] == lengths
    assert all(len(prompt.next_ids) == steps > 0 for prompt in prompts)
    assert lengths[0] == SHORT
    assert lengths[1] > min(record.model.cache_lens(record.shape.cache_len)) or None in record.model.sliding_window
    assert None not in record.model.sliding_window or lengths[1] + steps <= record.shape.cache_len


def test_one_layer_at_a_time_is_the_whole_model(case, prompts):
    record = case.graphs.record
    model = static_model(
        record.model,
        record.model.cache_lens(record.shape.cache_len),
        effective_weights(case.graphs),
        case.graphs.rounded_weights(),
    )
    for prompt in prompts:
        stepper = TorchStepper(model, record.cache_dtype)
        stepper.reset(1)
        expected = [stepper.step(prompt.ids[None], np.zeros(1, np.int64))]
        for i, token_id in enumerate(prompt.next_ids):
            assert token_id == prompt.outputs[i].argmax()
            expected.append(stepper.step(np.array([[token_id]]), np.array([len(prompt.ids) + i])))
        assert reference.difference(prompt.outputs, np.concatenate(expected)) <= bound(case.graphs)


def test_onnxruntime_gives_the_same(case, prompts):
    for prompt in prompts:
        theirs = onnx_shifted(case.graphs)
        for i, token_id in enumerate([*prompt.ids, *prompt.next_ids]):
            found = theirs.step(np.array([[token_id]]), np.array([i]))
            if i >= len(prompt.ids) - 1:
                expected = prompt.outputs[i - len(prompt.ids) + 1][None]
                assert reference.difference(found, expected) <= bound(case.graphs)


def test_the_artifact_answers_as_its_golden_prompts_say(case, prompts):
    engine = Engine.open(case.artifact, threads=1)
    checks = replay(SideBySide(engine, engine.slots), prompts)
    assert all(check.ok for check in checks), checks


def test_they_go_into_an_artifact_and_out_again(compile_case, tmp_path):
    case = compile_case("windowed")
    shutil.copytree(case.artifact, tmp_path / "artifact")
    before = Artifact.open(tmp_path / "artifact")
    write_golden(golden_prompts(case.graphs), tmp_path / "golden")
    after = add_golden(before, tmp_path / "golden")
    assert {entry.path for entry in after.manifest.files} - {entry.path for entry in before.manifest.files} == {
        after.manifest.golden
    }
    for prompt, again in zip(
        golden_prompts(case.graphs), read_golden(after.folder / after.manifest.golden), strict=True
    ):
        assert all(np.array_equal(a, b) for a, b in zip(vars(prompt).values(), vars(again).values(), strict=True))
    assert Engine.open(after.folder, threads=1).manifest.build_key == before.manifest.build_key


def test_another_file_is_no_golden_file(compile_case):
    with pytest.raises(UserError, match="holds no golden prompt"):
        read_golden(compile_case("windowed").artifact / "weights.safetensors")
