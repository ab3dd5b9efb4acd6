"""How much memory an export takes, predicted from headers alone, and its refusal where the machine has less.

The constants were measured with the versions in requirements.lock. Loads neither torch nor TVM.
"""

from math import prod

from export.calibration.methods import LENGTH, ROUNDED_AT_ONCE, calibration, searched
from export.checkpoints.checkpoint import BLOCK_ELEMENTS, Checkpoint
from export.checkpoints.gguf.checkpoint import ROWS_AT_ONCE
from export.checkpoints.source import SourceTensor
from export.onnx_graphs.graphs import GraphsRecord
from export.weights.stored import WeightsRecord
from export.weights.table import format_of
from runtime.artifact.tensor_file import numpy_dtype
from runtime.errors import UserError
from runtime.process_memory import machine_memory

MB, GB = 1e6, 1e9
# Peaks are VmHWM. Export: with torch and onnx loaded, while weights are stored; and tracing, which comes after that.
EXPORT_LOADED = 343 * MB
EXPORT_TRACED = 447 * MB  # tiny, 2 layers; a calibration loads no more, by the peak of tiny with it: 449 MB
EXPORT_LAYER = 0.4 * MB  # SmolLM2-135M, with 30 layers, ends its tracing 12 MB above tiny
SOLVING = 3  # matrices of the size of the second moments, at the most, while one is solved: itself and two factors
ROUNDING = 24  # bytes that rounding holds for each number that is rounded together: quotients, scales, zero points
UNPACKING = 5  # arrays of some rows that gguf holds while it unpacks them
VOCABULARY_ENTRY = 600  # bytes that each entry of the tokenizer leaves on the heap: 29 MB for SmolLM2-135M's 49152
# The ages of a cache's slots are constants of every graph: int64 in the file, and so many bytes for each slot at the
# peak of the tracing, measured at 2**24 and 2**26 slots.
AGE_BYTES = 32
BUILD_AGE_BYTES = 48  # the same for the build that follows, measured at 2**22 and 2**24 slots
GRAPH_LIMIT = 2**31 - 2**24  # bytes of one ONNX file, whose format ends at 2 GiB


def check_storing_memory(checkpoint: Checkpoint, record: WeightsRecord) -> None:
    """Raise `UserError` if storing the weights needs more memory than this machine has in all."""
    needed, memory = storing_peak(checkpoint, record), machine_memory()
    if needed > memory:
        raise UserError(
            f"storing the weights takes {needed / GB:,.1f} GB of memory, but this machine has {memory / GB:,.1f} GB; "
            f"compile on a larger machine{'' if calibration(record) is None else ', or set quantize.method to search'}"
        )


def check_graphs_memory(record: GraphsRecord) -> None:
    """Raise `UserError` for caches of so many slots that their graphs take all memory, or cannot be written."""
    slots = max(record.model.cache_lens(record.shape.cache_len))
    needed, memory = max(tracing_peak(record), BUILD_AGE_BYTES * ages(record)), machine_memory()
    if needed > memory:
        raise UserError(
            f"compiling with caches of {slots} slots takes {needed / GB:,.1f} GB of memory, but this machine has "
            f"{memory / GB:,.1f} GB; make shape.cache_len smaller, or compile on a larger machine"
        )
    if 8 * ages(record) > GRAPH_LIMIT:
        raise UserError(
            f"the caches have {ages(record)} slots of different lengths, and a graph can be written for at most "
            f"{GRAPH_LIMIT // 8}; make shape.cache_len smaller"
        )


def export_bytes(checkpoint: Checkpoint, record: GraphsRecord) -> int:
    """Peak of the export process: while it rounds weights by a calibration text, stores them, or traces."""
    return max(storing_peak(checkpoint, record), tracing_peak(record))


def storing_peak(checkpoint: Checkpoint, record: WeightsRecord) -> int:
    """Peak of the export process while it rounds and stores weights."""
    vocabulary = VOCABULARY_ENTRY * record.model.vocab_size if checkpoint.tokenizer else 0
    calibrating = calibration_bytes(record)
    held = max(EXPORT_LOADED + storing_bytes(checkpoint, record), EXPORT_TRACED + calibrating if calibrating else 0)
    return round(vocabulary + held)


def calibration_bytes(record: WeightsRecord) -> int:
    """Most that export holds, beyond its base, while it rounds weights by a calibration text, a layer at a time.

    It holds the layer in float32, the states before and behind it, and the moments and a sample of all inputs; then,
    for one matrix after the other, what solving and rounding it take. The head is read a block at a time.
    """
    method = calibration(record)
    if method is None:
        return 0
    states = 2 * 4 * method.rows * LENGTH * record.model.dim
    peak = 0
    for layer in range(record.model.n_layers):
        tensors = [tensor for tensor in record.tensors if tensor.name.startswith(f"layers.{layer}.")]
        inputs = [tensor.shape[1] for tensor in searched(record) if tensor in tensors]
        weights = 4 * sum(prod(tensor.shape) for tensor in tensors)
        samples = 4 * LENGTH * sum(inputs)
        activations = 4 * LENGTH * max((sum(tensor.shape) for tensor in tensors if len(tensor.shape) == 2), default=0)
        solving = rounding = 0
        if inputs:
            moments = 4 * sum(k * k for k in inputs) if method.solves else 0
            solving = moments + (SOLVING - 1) * 4 * max(inputs) ** 2 if method.solves else 0
            rounding = ROUNDING * min(ROUNDED_AT_ONCE, max(prod(tensor.shape) for tensor in tensors))
        peak = max(peak, states + weights + samples + max(activations, solving + rounding))
    return peak


def tracing_peak(record: GraphsRecord) -> int:
    """Peak of the export process while it traces."""
    return round(EXPORT_TRACED + EXPORT_LAYER * record.model.n_layers + AGE_BYTES * ages(record))


def ages(record: GraphsRecord) -> int:
    """Numbers in the constants that give the ages of the slots: one for each slot of each length of cache."""
    return sum(set(record.model.cache_lens(record.shape.cache_len)))


def storing_bytes(checkpoint: Checkpoint, record: WeightsRecord) -> int:
    """Most that export holds, beyond its base, while it reads and stores weights a block at a time."""
    peak = before = kept = 0  # before and kept: the previous block, as read and as stored
    formats = {tensor.name: format_of(tensor.stored) for tensor in record.tensors}
    for name, weight in checkpoint.weights.items():
        stored = formats[name]
        for part in weight.parts:
            tensor = checkpoint.source.tensors[part.source]
            itemsize = numpy_dtype(tensor.dtype).itemsize
            columns = prod(part.shape[1:])
            paired = part.interleaved_heads is not None  # read whole, and held a second time in the other order
            for rows in block_rows(part.shape[0], part.shape[0] if paired else max(BLOCK_ELEMENTS // columns, 1)):
                elements = rows * columns
                block = elements * itemsize * (2 if paired else 1)
                reading = before + kept + block + unpacking_bytes(tensor, itemsize, rows, columns)
                storing = kept + block + elements * ((4 if itemsize < 4 else 0) + stored.working_bytes)
                peak = max(peak, reading, storing)
                kept = elements * stored.kept_bytes
                before = 0 if itemsize == stored.kept_bytes == 4 else block  # stored as it was read: one array, not two
    return peak


def unpacking_bytes(tensor: SourceTensor, itemsize: int, rows: int, columns: int) -> int:
    """Bytes that reading rows of a packed tensor takes besides the result; 0 for one that is stored as numbers."""
    packed = tensor.nbytes * rows * columns // prod(tensor.shape)
    return packed + UNPACKING * itemsize * ROWS_AT_ONCE * columns if packed < rows * columns * itemsize else 0


def block_rows(rows: int, at_once: int) -> list[int]:
    """Number of rows in each block."""
    return [min(at_once, rows - start) for start in range(0, rows, at_once)]
