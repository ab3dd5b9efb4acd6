"""Every model and checkpoint form of the family, compared with `transformers`.

Each runs through torch, onnxruntime and, unless it is another row's model in another format, the compiled artifact. The
raw rows and the interleaved windows are also compared with a plain reference, written from the definitions, at the
same lengths.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from build.compile import compile_job
from build.parity import run_artifact_rungs
from build.tvm_stage.dispatch import DEFAULT_SCHEDULE, dispatch
from build.tvm_stage.importer import import_graphs
from export.job import Job
from export.parity import run_rungs
from export.pipeline import export_model
from export.proof.ladder import Case, Logits, load_trace
from export.results import open_configured
from runtime.artifact.bounds import relative_bound
from runtime.artifact.manifest import ModelConfig, ParityRow, TargetSpec
from runtime.engines.engine import Engine
from tests.helpers import raw_mistral, reference
from tests.helpers.artifacts import ONE_LEVEL
from tests.helpers.checked_schedules import check_schedule
from tests.helpers.families import FAMILIES, WINDOW

CHUNK = 4  # divides the window, but not the other lengths
CACHE_LEN = 2 * WINDOW + 3
SHARED = ("ministral", "mixtral")  # whose slots are tested: windows that differ by layer, and a mixture of experts
# Models of other rows in other formats: what is compiled is the same once they are read.
READ_IN_ANOTHER_WAY = (
    "raw",
    "raw-ministral",
    "raw-mixtral",
    "raw-ministral-3",
    "gguf-ministral-3",
    "mistral-small-3",  # mistral-v0.2 beside an image encoder
)
CUDA = TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",))


@dataclass(frozen=True)
class Proved:
    """A compiled family: its rows of the ladder, and onnxruntime's answers in every case."""

    name: str
    checkpoint: Path
    artifact: Path | None
    left_to_default_schedules: list[str]  # on CUDA
    model: ModelConfig
    weights: dict[str, NDArray[Any]]
    rows: list[ParityRow]
    cases: list[Case]
    answers: list[list[Logits]]


@pytest.fixture(scope="module", params=FAMILIES)
def proved(request, tmp_path_factory) -> Proved:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].write(folder / "checkpoint")
    config = {
        "name": request.param,
        "frontend": {"checkpoint": "checkpoint"},
        "shape": {"prefill_chunk": [CHUNK], "cache_len": CACHE_LEN, "slots": 2 if request.param in SHARED else 1},
        "quantize": {"scheme": "none"},  # those that are carried have tests of their own
        "backend": {"target": "llvm", "cpu": ONE_LEVEL},
    }
    with contextlib.chdir(folder):
        path = Path("model.yaml")
        path.write_text(json.dumps(config))
        job = Job.load(path)
        checkpoint, graphs = open_configured(job.config), export_model(job)
        rows = run_rungs(job.config, checkpoint, graphs, folder / "trace.npz")
        cases, answers = load_trace(folder / "trace.npz")
        artifact = None if request.param in READ_IN_ANOTHER_WAY else compile_job(job)
        rows += run_artifact_rungs(artifact, cases, answers) if artifact else []
        report = dispatch(import_graphs(graphs), CUDA).report
        left = [row.op for row in report if row.kernel == DEFAULT_SCHEDULE]
        weights = {tensor: checkpoint.tensor(tensor) for tensor in checkpoint.names()}
        return Proved(
            request.param,
            folder / "checkpoint",
            artifact.folder if artifact else None,
            left,
            checkpoint.model,
            weights,
            rows,
            cases,
            answers,
        )


def test_every_rung_passes_at_every_length(proved):
    # without a window, the chunk is the length at which things can go wrong
    size = WINDOW if any(proved.model.sliding_window) else CHUNK
    assert {len(case.sequences[0]) for case in proved.cases} >= {1, size - 1, size, size + 1, 2 * size + 3}
    assert {row.rung for row in proved.rows} == {"1", "2", "4", *(("3", "5") if proved.artifact else ())}
    assert [row.compared for row in proved.rows if not row.passed] == []
    assert all(row.top1_agreement == 1 for row in proved.rows)


def test_a_plain_reference_says_the_same(proved):
    """The comparison is in float64, from our weights.

    For the raw format it is from the file's own tensors, whose neighbouring rows are rotated as complex numbers.
    """
    bound = relative_bound(proved.model, CACHE_LEN, "fp32")
    for case, found in zip(proved.cases, proved.answers, strict=True):
        expected = plain_logits(proved, case.sequences[0].tolist())
        for (end, *_), logits in zip(case.ends(), found, strict=True):
            assert end < 0 or reference.difference(logits[0], expected[end]) <= bound, (case.label, end)


def plain_logits(proved, ids):
    path = proved.checkpoint / "params.json"
    if not path.is_file():
        return reference.logits(proved.model, proved.weights, ids)
    params = json.loads(path.read_text())
    return raw_mistral.raw_logits(params, raw_mistral.raw_tensors(params), ids)


def test_requests_that_share_steps_give_the_bits_that_they_give_alone(proved):
    if proved.name in SHARED:
        check_schedule(Engine.open(proved.artifact, threads=2), seed=0)


def test_cuda_leaves_nothing_to_default_schedules(proved):
    """Every operation has found its kernel; machine code is made in `tests/build_stage`."""
    assert proved.left_to_default_schedules == []


def test_layers_have_the_windows_of_their_row(proved):
    full = {
        "mistral-v0.2",
        "nemo",
        "mixtral",
        "raw-mixtral",
        "yarn",
        "llama-3",
        "ministral-3",
        "raw-ministral-3",
        "gguf-ministral-3",
        "mistral-small-3",
    }
    expected = (
        (None, WINDOW, WINDOW, WINDOW)
        if proved.name in ("ministral", "raw-ministral")
        else (None if proved.name in full else WINDOW,) * proved.model.n_layers
    )
    assert proved.model.sliding_window == expected
    assert proved.model.cache_lens(CACHE_LEN) == tuple(window or CACHE_LEN for window in expected)
