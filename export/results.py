"""The plan of an export: the records it will make, and the keys and folders of its stages.

All of it follows from the configuration and the checkpoint's headers alone. This module does not import torch.
"""

import hashlib
from pathlib import Path

import msgspec

from export.calibration.methods import METHODS
from export.checkpoints.adapters.adapter import adapter_files
from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.checkpoints.json_files import read_text
from export.checkpoints.location import checkpoint_files
from export.checkpoints.source import identity
from export.checkpoints.tokenizers.chat import Chat
from export.configuration.config import CompileConfig, one_of
from export.job import Job
from export.onnx_graphs.graphs import GraphsRecord, record_path
from export.stage import stage_key
from export.weights.stored import WeightsRecord
from export.weights.storing import record_of
from export.workspace import stage_folder
from runtime.artifact.caches import CACHE_FORMATS
from runtime.artifact.manifest import ModelConfig, Quantization, Shape
from runtime.artifact.signatures import size_problems
from runtime.artifact.targets import TARGETS
from runtime.errors import UserError

WEIGHTS_STAGE, GOLDEN_STAGE = "weights", "golden"
LAYERS_STAGE = "layers"  # of a calibration, until the weights are stored
STORING_TOOLS = ("numpy", "ml_dtypes", "gguf", "torch", "sentencepiece", "tokenizers")  # torch reads .pth files
CALIBRATION_TOOLS = ("numpy", "torch", "sentencepiece", "tokenizers")
TRACING_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")


def open_configured(config: CompileConfig) -> Checkpoint:
    """The checkpoint that a config names, with its overrides and its adapter."""
    frontend = config.frontend
    chat = Chat(frontend.instruct, _chat_template(config))
    return open_checkpoint(
        frontend.checkpoint,
        frontend.type,
        frontend.overrides,
        chat=chat,
        head=frontend.head,
        adapter=frontend.adapter,
    )


def _chat_template(config: CompileConfig) -> str | None:
    """The text of the template that a config names."""
    path = config.frontend.chat_template
    return None if path is None else read_text(path)


def weights_record(config: CompileConfig, checkpoint: Checkpoint) -> WeightsRecord:
    """The record of the weights that an export will store."""
    return record_of(checkpoint, quantization_of(config), config.backend.dtype, config.frontend.overrides)


def graphs_record(config: CompileConfig, weights: WeightsRecord) -> GraphsRecord:
    """The record of the graphs that an export will trace over stored weights.

    Raises `UserError` for sizes that no kernel can index, and for caches in groups that do not fit the heads.
    """
    _check_cache_fits(config, weights.model)
    record = GraphsRecord.over(weights, shape_of(config), config.cache_dtype)
    for problem in (clause for function in record.functions for clause in size_problems(record.model, function)):
        raise UserError(f"{problem}; make shape.slots, shape.prefill_chunk or shape.cache_len smaller")
    return record


def _check_cache_fits(config: CompileConfig, model: ModelConfig) -> None:
    """Raise `UserError` if the model's heads do not consist of whole groups of the configured cache."""
    wanted = CACHE_FORMATS[config.cache_dtype]
    if not wanted.fits(model.head_dim):
        fitting = [name for name in TARGETS[config.backend.target].caches if CACHE_FORMATS[name].fits(model.head_dim)]
        raise UserError(
            f"quantize.cache is {config.cache_dtype}, which stores keys and values in groups of {wanted.group} numbers,"
            f" but the model's head_dim is {model.head_dim}, expected a multiple of it; use {one_of(fitting)}"
        )


def export_record(config: CompileConfig, checkpoint: Checkpoint) -> GraphsRecord:
    """The record of the graphs that an export of a checkpoint will produce."""
    return graphs_record(config, weights_record(config, checkpoint))


def quantization_of(config: CompileConfig) -> Quantization:
    """How the config stores weights."""
    q = config.quantize
    plain = Quantization(
        scheme=q.scheme,
        group_size=q.group_size,
        symmetric=q.symmetric,
        keep=q.keep,
        keep_scheme=q.keep_scheme,
    )
    return msgspec.structs.replace(
        plain,
        method=q.method if plain.grouped else None,
        whole_products=plain.carries and TARGETS[config.backend.target].rounds_activations,
    )


def shape_of(config: CompileConfig) -> Shape:
    """The static sizes that the config asks for."""
    shape = config.shape
    return Shape(
        slots=shape.slots,
        step_rows=shape.step_rows or step_rows(shape.slots, TARGETS[config.backend.target].most_rows),
        prefill_chunks=shape.prefill_chunks,
        cache_len=shape.cache_len,
    )


def step_rows(slots: int, most: int) -> tuple[int, ...]:
    """The default rows of steps: powers of two, until one step holds all slots, but at most `most`."""
    enough = min(slots, most)
    return tuple(2**i for i in range((enough - 1).bit_length() + 1))


def weights_key(config: CompileConfig) -> str:
    """Key of stored weights: the checkpoint's files, the settings for reading and storing them, our code and the tools.

    Does not open the checkpoint. The config's name and shape do not count, and of the target machine only whether it
    rounds activations for carried weights.
    """
    frontend = config.frontend
    inputs = {
        "type": frontend.type,
        "instruct": frontend.instruct,
        "chat_template": _chat_template(config),
        "head": frontend.head,
        "overrides": dict(frontend.overrides),
        "quantization": quantization_of(config),
        "calibration": _calibration_key(config),
        "dtype": config.backend.dtype,
        "checkpoint": identity(checkpoint_files(frontend.checkpoint, frontend.type)),
        "adapter": None if frontend.adapter is None else identity(adapter_files(frontend.adapter)),
    }
    return stage_key(inputs, "export.weights.storing", STORING_TOOLS)


def _calibration_key(config: CompileConfig) -> str | None:
    """Key of a calibration: its text, our code and the tools; None if the weights are rounded without one."""
    method, path = quantization_of(config).method, config.quantize.calibration
    if method is None or not METHODS[method].rows:
        return None
    text = None if path is None else hashlib.sha256(read_text(path).encode()).hexdigest()
    return stage_key({"text": text}, "export.calibration.run", CALIBRATION_TOOLS)


def graphs_key(config: CompileConfig) -> str:
    """Key of exported graphs: the stored weights, the static shapes, the caches' dtype, our code and the tools."""
    inputs = {
        "weights": weights_key(config),
        "shape": shape_of(config),
        "cache": config.cache_dtype,
    }
    return stage_key(inputs, "export.onnx_graphs.tracing", TRACING_TOOLS)


def golden_key(config: CompileConfig) -> str:
    """Key of the golden prompts of an export."""
    return stage_key({"graphs": graphs_key(config)}, "export.golden", ("torch", "numpy"))


def weights_folder(job: Job) -> Path:
    """The folder of the job's stored weights, once they are complete."""
    return stage_folder(job.workspace, WEIGHTS_STAGE, weights_key(job.config))


def graphs_path(job: Job) -> Path:
    """The file of the record of the job's graphs, once they are complete: beside its stored weights."""
    return record_path(weights_folder(job), graphs_key(job.config))
