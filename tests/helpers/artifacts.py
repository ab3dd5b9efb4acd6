"""Tiny models, exported and compiled once for all tests, and two references for artifacts: torch and onnxruntime."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from filelock import FileLock
from numpy.typing import NDArray

from build.compile import compile_job
from export.checkpoints.checkpoint import Checkpoint
from export.configuration.config import CompileConfig
from export.job import Job
from export.onnx_graphs.graphs import OnnxGraphs
from export.onnx_graphs.ort_values import ort_value
from export.pipeline import export_model
from export.results import open_configured
from export.static_model.model import StaticModel, constants
from export.weights.table import load
from runtime.artifact.caches import GROUP, RING_BLOCK, cache_format
from runtime.artifact.manifest import ModelConfig
from runtime.artifact.schemes import TokenRounding
from runtime.artifact.tensor_file import BITS, bits_dtype
from runtime.engines.engine import Engine
from runtime.engines.host import HostCaches
from tests.helpers import cache_reference, reference
from tests.helpers.tiny import write_tiny_mistral

WINDOW = 8
ONE_LEVEL = "x86-64-v3"  # of the CPU
CACHE_LEN = 40  # for models without a window


@dataclass(frozen=True)
class Case:
    """A tiny model and how it is compiled."""

    model: Mapping[str, Any]  # arguments of MistralConfig
    config: Mapping[str, Any]  # sections of the YAML


CASES = {
    # float32, a window shorter than the largest chunk, two layers
    "windowed": Case({"sliding_window": WINDOW}, {"shape": {"prefill_chunk": [16, 4], "cache_len": CACHE_LEN}}),
    # int8 with a tied head (the embedding is then int8 as well), full attention, two slots, no grouping, odd sizes
    "int8": Case(
        {
            "sliding_window": None,
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
            "num_key_value_heads": 4,
            "vocab_size": 301,
            "intermediate_size": 90,
        },
        {"shape": {"prefill_chunk": 5, "cache_len": CACHE_LEN, "slots": 2}, "quantize": {"scheme": "int8"}},
    ),
    # float16 weights and caches, two slots, a window, head_dim different from dim / n_heads, groups of four
    "fp16": Case(
        {"sliding_window": WINDOW, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 20},
        {
            "shape": {"prefill_chunk": 6, "cache_len": CACHE_LEN, "slots": 2},
            "backend": {"dtype": "fp16"},
        },
    ),
    # int4 with zero points and rounded tokens, the head kept in int8, a tied head, full attention
    "int4": Case(
        {"sliding_window": None, "tie_word_embeddings": True},
        {
            "shape": {"prefill_chunk": 6, "cache_len": CACHE_LEN},
            "quantize": {"scheme": "int4_dynamic", "symmetric": False, "keep": ["head"], "keep_scheme": "int8"},
        },
    ),
    # int8 with rounded tokens: the inputs of wqkv and w13 have two groups of 64, that of wo has one, and all 96 numbers
    # of w2's input form one group
    "int8_dynamic": Case(
        {"sliding_window": WINDOW, "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 96},
        {"shape": {"prefill_chunk": 6, "cache_len": CACHE_LEN}, "quantize": {"scheme": "int8_dynamic"}},
    ),
    # several CPU levels in one artifact, of which one changes no kernel
    "levels": Case(
        {"sliding_window": WINDOW, "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 96},
        {
            "shape": {"prefill_chunk": 4, "cache_len": CACHE_LEN},
            "quantize": {"scheme": "int8_dynamic"},
            "backend": {"cpu": ["x86-64-v3", "haswell", "x86-64-v4", "native"]},
        },
    ),
    # int8 caches with two layers and two slots, a window that is not a whole block of columns, two chunks, groups of
    # heads that share a key
    "int8_cache": Case(
        {"sliding_window": WINDOW},
        {"shape": {"prefill_chunk": [6, 2], "cache_len": CACHE_LEN, "slots": 2}, "quantize": {"cache": "int8"}},
    ),
    # fp8 caches with two slots, a window, groups of heads that share a key
    "fp8_cache": Case(
        {"sliding_window": WINDOW, "num_hidden_layers": 1},
        {"shape": {"prefill_chunk": 6, "cache_len": CACHE_LEN, "slots": 2}, "quantize": {"cache": "fp8"}},
    ),
    # int4 caches with two groups of numbers in each head, two slots, two chunks, groups of heads that share a key
    "int4_cache": Case(
        {"sliding_window": WINDOW, "num_hidden_layers": 1, "head_dim": 64},
        {"shape": {"prefill_chunk": [6, 2], "cache_len": CACHE_LEN, "slots": 2}, "quantize": {"cache": "int4"}},
    ),
    # bfloat16 weights and activations, float16 caches, two layers of which the last is kept in int4
    "bf16": Case(
        {"sliding_window": WINDOW},
        {
            "shape": {"prefill_chunk": 4, "cache_len": CACHE_LEN},
            "quantize": {"scheme": "bf16_dot", "keep": ["last"], "keep_scheme": "int4"},
            "backend": {"dtype": "bf16"},
        },
    ),
    # float32, a window, three slots, and steps that have more rows than there are slots: the case for tests of batched
    # generation
    "batched": Case(
        {"sliding_window": WINDOW},
        {"shape": {"prefill_chunk": [16, 4], "cache_len": CACHE_LEN, "slots": 3, "step_rows": [1, 4]}},
    ),
}


@dataclass(frozen=True)
class Compiled:
    """The folder of a case, in which `NAME.yaml` was compiled.

    All paths in it are relative, so a copy of it works as well.
    """

    name: str
    folder: Path
    config: CompileConfig
    checkpoint: Checkpoint
    graphs: OnnxGraphs

    @property
    def artifact(self) -> Path:
        return self.folder / "out" / self.name

    @property
    def workspace(self) -> Path:
        return self.folder / "out" / ".work" / self.name


def write_case(name: str, case: Case, folder: Path) -> Path:
    """Write the checkpoint and the YAML of a case into `folder`; return the YAML's path."""
    if not (folder / "checkpoint").is_dir():
        write_tiny_mistral(folder / "checkpoint", **case.model)
    path = folder / f"{name}.yaml"
    frontend = {"checkpoint": "checkpoint", "type": "huggingface"}
    # Each further CPU level would be compiled as well; `tests/build_stage/tvm_stage/test_cpu_levels.py` is about those.
    backend = {"target": "llvm", "cpu": ONE_LEVEL, **case.config.get("backend", {})}
    path.write_text(json.dumps({"name": name, "frontend": frontend, **case.config, "backend": backend}))
    return path


def cuda_case(archs: Sequence[str], dtype: str = "fp16", scheme: str = "none", cache: str = "auto") -> Case:
    """The smallest case that reaches every GPU operation except the mixture.

    `tests/build_stage/tvm_stage/test_cuda_7b.py` compiles the code for tensor cores.
    """
    backend = {"target": "cuda", "arch": list(archs), "dtype": dtype}
    return Case(
        {"sliding_window": 8, "num_hidden_layers": 1},
        {
            "shape": {"prefill_chunk": 4, "cache_len": 16},
            "quantize": {"scheme": scheme, "cache": cache},
            "backend": backend,
        },
    )


CUDA_ARCHS = ("sm_80", "sm_90a")
# with fp8 caches, which are read by other instructions on each of these
SHARED = {**CASES, "cuda": cuda_case(CUDA_ARCHS, cache="fp8")}


def compiled(name: str, shared: Path) -> Compiled:
    """A case of `SHARED`, compiled in this process, in a folder `shared` that all processes of a test run share."""
    folder = shared / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(shared / f"{name}.lock"), contextlib.chdir(folder):
        job, graphs = _exported(Path(write_case(name, SHARED[name], folder).name))
        compile_job(job)
        checkpoint = open_configured(job.config)
    return Compiled(name, folder, job.config, checkpoint, OnnxGraphs.open(folder / graphs.path))


def exported(name: str, folder: Path, case: Case) -> tuple[CompileConfig, OnnxGraphs]:
    """A case's configuration and graphs, for tests that need no artifact of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        job, graphs = _exported(Path(write_case(name, case, folder).name))
    return job.config, OnnxGraphs.open(folder / graphs.path)


def _exported(path: Path) -> tuple[Job, OnnxGraphs]:
    """Export from the current folder, in this process."""
    job = Job.load(path)
    return job, export_model(job)


def effective_weights(graphs: OnnxGraphs) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors that exported graphs compute with: dequantized, under the model's names."""
    stored = graphs.weights()
    arrays = {name: stored.read(name) for name in stored.tensors}
    return {tensor.name: load(tensor, arrays) for tensor in graphs.record.tensors}


def static_model(
    model: ModelConfig,
    cache_lens: tuple[int, ...],
    weights: Mapping[str, NDArray[Any]],
    rounded: Mapping[str, TokenRounding] | None = None,
) -> StaticModel:
    """Our torch module with weights and constants loaded."""
    tensors = {
        name: torch.from_numpy(np.array(array)) for name, array in {**weights, **constants(model, cache_lens)}.items()
    }
    module = StaticModel(model, cache_lens).eval()
    module.load_state_dict(tensors, strict=True)
    module.round_products(rounded or {})
    return module


def bound(graphs: OnnxGraphs, *, on_cpu: bool = False, on_tensor_cores: bool = False) -> float:
    """`tests.helpers.reference.bound` for exported graphs, or for what was compiled from them."""
    record = graphs.record
    return reference.bound(
        record.model,
        CACHE_LEN,
        record.cache_dtype,
        record.quantization.rounding,
        on_cpu=on_cpu,
        on_tensor_cores=on_tensor_cores,
    )


class Shifted:
    """A callable from (ids, positions, *caches) to (logits, *caches) whose caches are carried from call to call.

    The newest column is last.
    """

    def __init__(self, call: Callable[..., list[NDArray[Any]]], caches: Sequence[NDArray[Any]]) -> None:
        self.call = call
        self.caches = list(caches)

    def step(self, ids: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.float32]:
        """Map ids (B, T) at positions `first` (B,) and onwards to logits (B, vocab)."""
        positions = first[:, None] + np.arange(ids.shape[1])
        logits, *self.caches = self.call(ids, positions, *self.caches)
        return logits[:, 0]

    def feed(self, rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> NDArray[np.float32]:
        """Feed sequences from position 0, left-padded to the sum of `sizes`; return the last logits (B, vocab)."""
        total = sum(sizes)
        ids = np.array([[0] * (total - len(row)) + list(row) for row in rows], np.int64)
        first = np.array([len(row) - total for row in rows])
        starts = np.cumsum([0, *sizes[:-1]])
        return [
            self.step(ids[:, start : start + size], first + start) for start, size in zip(starts, sizes, strict=True)
        ][-1]


def torch_shifted(module: StaticModel, rows: int, dtype: str = "float32") -> Shifted:
    """StaticModel with empty caches, whose numbers are of this dtype; it takes any chunk size."""
    c = module.config
    caches = [
        np.zeros((rows, c.n_kv_heads, w, part.width), bits_dtype(part.dtype))
        for w in module.cache_lens
        for part in cache_format(dtype).parts(c.head_dim)
        for _side in ("key", "value")
    ]

    @torch.no_grad()
    def call(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
        ids, positions, *past = map(torch.from_numpy, arrays)
        if dtype in BITS:
            logits, *present = module(ids, positions, *(tensor.view(getattr(torch, dtype)) for tensor in past))
            return [logits.numpy(), *(tensor.view(torch.uint8).numpy() for tensor in present)]
        return [tensor.numpy() for tensor in module(ids, positions, *past)]

    return Shifted(call, caches)


def onnx_shifted(graphs: OnnxGraphs, rows: int = 1) -> Shifted:
    """onnxruntime on the exported graphs that take so many rows, with empty caches: of one row, chunks and steps."""
    taken = [graph for graph in graphs.record.graphs if graph.rows == rows]
    sessions = {graph.tokens: onnx_session(graphs.onnx_path(graph)) for graph in taken}

    inputs = taken[0].signature.inputs

    def call(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
        given = {spec.name: ort_value(array, spec.dtype) for spec, array in zip(inputs, arrays, strict=True)}
        return sessions[arrays[0].shape[1]].run(None, given)

    return Shifted(call, [np.zeros(spec.shape, bits_dtype(spec.dtype)) for spec in taken[0].signature.caches])


def onnx_session(path: Path) -> onnxruntime.InferenceSession:
    """A session that computes every node as written: no fusion, and no weight is quantized a second time."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def rings_of(engine: Engine) -> list[NDArray[Any]]:
    """The arrays that an engine's functions update: (slots, n_kv_heads, columns, width) each."""
    assert isinstance(engine.loaded.caches, HostCaches)
    return list(engine.loaded.caches.rings)


def column_of(rings: Sequence[NDArray[Any]], i: int, column: int) -> NDArray[Any]:
    """One column (slots, n_kv_heads, width) of ring i of floats, as a view; see `by_column`."""
    slots, heads, columns, width = rings[i].shape
    if i % 2:
        return rings[i][:, :, column]
    blocks = rings[i].reshape(slots, heads, columns // RING_BLOCK, width, RING_BLOCK)
    return blocks[:, :, column // RING_BLOCK, :, column % RING_BLOCK]


def rings_of_a_layer(rings: Sequence[NDArray[Any]]) -> int:
    """How many tensors each layer has; two if all of a model's have one dtype, which may be the bits of another."""
    if len({ring.dtype for ring in rings}) == 1:
        return 2
    return 2 * len(list(cache_format(str(rings[0].dtype)).parts(GROUP)))


def by_column(rings: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """An engine's rings in the order of their columns; see `cache_reference.by_column`."""
    each = rings_of_a_layer(rings)
    ordered = list(rings)
    for i in range(0, len(rings), each):
        for side in range(2):
            ordered[i + side : i + each : 2] = cache_reference.by_column(rings[i + side : i + each : 2], side)
    return ordered


def dequantized(caches: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Keys and values of all layers, as the numbers that they stand for."""
    each = rings_of_a_layer(caches)
    return [
        cache_reference.widened(caches[i + side : i + each : 2])
        for i in range(0, len(caches), each)
        for side in range(2)
    ]


def random_ids(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids that depend only on the arguments."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
