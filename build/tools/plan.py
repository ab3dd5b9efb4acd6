"""`python -m build.tools.plan yaml/x.yaml [--set key.path=value ...]`: predict the footprint of a compile.

It works from the checkpoint's headers alone, before any work is done; the compile prints the same lines as measured.
Weights and caches are exact, since they follow from shapes. The rest is constants, each with a note on how it was
measured, plus terms that grow with the sizes of the model. Loads neither torch nor TVM. The constants were measured
with the versions in requirements.lock.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from build.packing.pack import BLOCK_ELEMENTS as PACK_ELEMENTS
from build.packing.pack import packed_weights
from build.tools.footprint import Footprint, caches_of, description, table
from build.tools.random_checkpoint import SHAPES, headers
from export.checkpoints.checkpoint import Checkpoint
from export.configuration.config import CompileConfig, config_parser, load_config
from export.console import console, output
from export.memory_use import BUILD_AGE_BYTES, ages, block_rows, export_bytes
from export.onnx_graphs.graphs import GraphsRecord
from export.results import export_record, open_configured
from runtime.artifact.consistency import LIBRARY_FILE, MANIFEST_FILE, WEIGHTS_FILE, library_file
from runtime.artifact.hashing import n_blocks
from runtime.artifact.layouts import ROW_MAJOR
from runtime.artifact.manifest import (
    SCHEMA_VERSION,
    CpuLevel,
    FileEntry,
    Manifest,
    TargetSpec,
    TensorSpec,
    WeightSpec,
    to_json,
)
from runtime.artifact.targets import TARGETS
from runtime.artifact.tensor_file import TensorFileWriter, numpy_dtype, tensor_bytes
from runtime.engines.loaded_artifact import PROCESS_BYTES, activation_bytes
from runtime.errors import run_command

MB = 1e6

# Library, fitted to five functions of tiny (2 layers, float32: 0.39 MB) and of SmolLM2-135M (30 layers, `source`: 0.77
# MB), to seven of SmolLM2-135M (float32, int8 and `source`: 0.97, 0.92 and 1.11 MB), and, for cuda, to two of tiny with
# two architectures (0.42 MB).
LIBRARY_GRAPH = 0.073 * MB  # each function's kernels
LIBRARY_MIXTURE = 0.05 * MB  # each function's kernels of a mixture
LIBRARY_ARCH = 0.05 * MB  # machine code of each function's kernels for each CUDA architecture
LIBRARY_CALLS = 0.0026 * MB  # the calls of one layer in one function

# Text of the graphs (ONNX, records, reports), measured on the same models: 30 kB per graph at 2 layers, 0.48 MB at 30.
GRAPH_TEXT = 0.003 * MB
LAYER_TEXT = 0.016 * MB  # for each layer of each graph

# Peaks are VmHWM. Build: with TVM loaded and tiny compiled; then the weights are packed.
BUILD_COMPILED = 350.5 * MB
# By whether the model is a mixture: SmolLM2-135M (30 layers), a narrow Mixtral (24 layers).
BUILD_LAYER = {False: 0.43 * MB, True: 1.15 * MB}

# Box, llvm: VmHWM of `python -m runtime.bench` minus weights, caches and activations, for tiny and for SmolLM2-135M in
# float32 and int8.
BOX_LOADED = 55 * MB
BOX_LAYER = 0.15 * MB  # the manifest's entries and tensor objects

MANIFEST_REST = 800  # bytes of CPU features and tool versions, which only the compiler knows
SUM = "0" * 64  # stands in for a SHA-256


def plan(config: CompileConfig, checkpoint: Checkpoint) -> Footprint:
    """Predict the footprint of compiling `config`."""
    record = export_record(config, checkpoint)
    backend = config.backend
    levels = [CpuLevel(cpu=cpu, features=()) for cpu in backend.cpu]
    target = TargetSpec.of(levels, kind=backend.target, dtype=backend.dtype, arch=backend.arch)
    weights = packed_weights(record, target.kind)
    files = {
        WEIGHTS_FILE: file_bytes(weights),
        **{library_file(target, level): library_bytes(record, target) for level in target.levels},
        **tokenizer_files(checkpoint, record),
    }
    files[MANIFEST_FILE] = manifest_bytes(config.name, record, target, weights, files)
    return Footprint(
        files=files,
        caches=caches_of(record.model, record.shape, record.functions[0].signature.caches),
        target=target,
        box_peak=box_bytes(record, target, files[WEIGHTS_FILE]),
        export_peak=export_bytes(checkpoint, record),
        build_peak=build_bytes(record, weights),
        workspace=workspace_bytes(record, files),
    )


def file_bytes(specs: Sequence[TensorSpec | WeightSpec]) -> int:
    """Exact size of a weight file."""
    return TensorFileWriter(Path(WEIGHTS_FILE), specs).nbytes


def tokenizer_files(checkpoint: Checkpoint, record: GraphsRecord) -> dict[str, int]:
    """Exact sizes of the tokenizer's files, which are copied."""
    source, spec = checkpoint.tokenizer, record.tokenizer
    if source is None or spec is None:
        return {}
    template = (
        {spec.chat_template: len(source.chat_template.encode())}
        if source.chat_template is not None and spec.chat_template
        else {}
    )
    return {spec.file: len(source.data), **template}


def library_bytes(record: GraphsRecord, target: TargetSpec) -> int:
    """Size of a library, of any CPU level: the kernels of each function, and the calls of each layer."""
    kernels = LIBRARY_GRAPH + (LIBRARY_MIXTURE if record.model.n_experts else 0) + LIBRARY_ARCH * len(target.arch)
    return round(len(record.graphs) * (kernels + LIBRARY_CALLS * record.model.n_layers))


def manifest_bytes(
    name: str, record: GraphsRecord, target: TargetSpec, weights: tuple[WeightSpec, ...], files: Mapping[str, int]
) -> int:
    """Size of the manifest, written with hashes and keys of the right length."""
    entries = tuple(
        FileEntry(path=name, size=size, sha256=SUM, blocks=(SUM,) * n_blocks(size)) for name, size in files.items()
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        build_key=SUM[:20],
        model=record.model,
        shape=record.shape,
        quantization=record.quantization,
        target=target,
        functions=record.functions,
        weights=weights,
        tokenizer=record.tokenizer,
        overrides=record.overrides,
        tools={},
        files=entries,
    )
    return len(to_json(manifest)) + MANIFEST_REST


def workspace_bytes(record: GraphsRecord, files: Mapping[str, int]) -> int:
    """Bytes that the stages leave in the workspace.

    These are the weights as exported, libraries, tokenizer, records, and ONNX files with the slot ages for each
    different cache length.
    """
    copied = sum(size for name, size in files.items() if name not in (WEIGHTS_FILE, MANIFEST_FILE))
    text = len(record.graphs) * (GRAPH_TEXT + LAYER_TEXT * record.model.n_layers + 8 * ages(record))
    return round(file_bytes(record.weights) + copied + text)


def box_bytes(record: GraphsRecord, target: TargetSpec, weights: int) -> int:
    """Peak memory on the box.

    For an llvm artifact, the peak of the process once caches are full and every weight has been read; for a cuda
    artifact, its device memory.
    """
    model = record.model
    caches = caches_of(model, record.shape, record.functions[0].signature.caches)
    activations = activation_bytes(model, record.functions)
    base = PROCESS_BYTES if TARGETS[target.kind].on_device else BOX_LOADED + BOX_LAYER * model.n_layers
    return round(base + weights + caches.sequences * caches.sequence_bytes + activations)


def build_bytes(record: GraphsRecord, weights: Sequence[WeightSpec]) -> int:
    """Peak of the build process: while it packs weights, after compiling."""
    layer = BUILD_LAYER[record.model.n_experts is not None]
    compiled = BUILD_COMPILED + layer * record.model.n_layers + BUILD_AGE_BYTES * ages(record)
    return round(compiled + packing_bytes(weights))


def packing_bytes(weights: Sequence[WeightSpec]) -> int:
    """Most that build holds, beyond its base, while it packs weights a block at a time.

    It holds the block as read, the block in panels, and the previous block in panels.
    """
    peak = kept = 0
    for spec in weights:
        before = 0  # the previous block as read; dropped between tensors
        for panels in block_rows(*_panels(spec)):
            block = panels * prod(spec.shape[1:]) * numpy_dtype(spec.dtype).itemsize
            peak = max(peak, kept + block + max(before, block))
            kept = before = block
    return peak


def _panels(spec: WeightSpec) -> tuple[int, int]:
    """Number of panels in one of the matrices that a tensor stacks, and how many of them are packed at once."""
    if spec.layout == ROW_MAJOR:
        return spec.shape[0], spec.shape[0]
    return spec.shape[0] // int(spec.layout.partition("x")[2] or 1), max(PACK_ELEMENTS // prod(spec.shape[1:]), 1)


def notes(footprint: Footprint, record: GraphsRecord) -> dict[str, str]:
    """Notes on how precise each line is, by its name."""
    sequence = "caches, a slot"
    table_bytes = sum(tensor_bytes(s) for s in record.weights if s.name.startswith("tok_embeddings."))
    rows = (
        ""
        if record.model.tied_embeddings
        else f", of which {table_bytes / MB:,.0f} MB are the embedding table, read row by row"
    )
    box = {
        "box: peak memory": f"3 % or 5 MB; with full caches{rows}",
        "box: GPU memory": f"weights, caches, activations and {PROCESS_BYTES / MB:,.0f} MB for what the driver keeps",
    }
    return {
        f"artifact: {WEIGHTS_FILE}": "exact",
        **{
            f"artifact: {library_file(footprint.target, level)}": "0.3 MB; none if no kernel changes at this level"
            for level in footprint.target.better_levels
        },
        f"artifact: {LIBRARY_FILE}": "0.3 MB",
        sequence: f"exact; {footprint.caches.share:.1%} of a uniform cache of {record.shape.cache_len} columns",
        "host: export, peak memory": "3 %; resident memory of the process",
        "host: build, peak memory": "3 %; of the process, without those of further CPU levels, the linker and nvcc",
        "host: workspace on disk": "kept for the next compile; an older artifact stays until the new one replaces it",
        **box,
    }


def main() -> int:
    """Print the plan; returns the exit status."""
    parser = config_parser("Predict the footprint of a compile from the checkpoint's headers.")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="plan for a model of these sizes, without a tokenizer, instead of the config's checkpoint",
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    checkpoint = headers(arguments.shape, config.frontend.overrides) if arguments.shape else open_configured(config)
    for note in checkpoint.notes:
        console.print(f"warning: {note}", style="yellow", markup=False)
    footprint, record = plan(config, checkpoint), export_record(config, checkpoint)
    output.print(
        table(
            description(config.name, record.model, footprint.target, record.quantization),
            footprint.rows(),
            notes(footprint, record),
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
