"""What an export will make, known from the configuration and the checkpoint's headers alone; loads no torch."""

from pathlib import Path

from export.checkpoints.checkpoint import Checkpoint, checkpoint_files, open_checkpoint
from export.checkpoints.source import TokenizerSource, identity
from export.configuration.config import CompileConfig
from export.onnx_graphs.graphs import GraphsRecord, make_graphs
from export.onnx_graphs.quantize import CACHE_STORAGE, STORAGE, FormatRules
from export.stage import stage_key
from runtime.artifact.manifest import Quantization, Shape, TokenizerSpec

EXPORT_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
TOKENIZER_FILES = {"tokenizer.json": "tokenizer.json", "sentencepiece": "tokenizer.model"}
GOLDEN_STAGE = "golden"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def open_configured(config: CompileConfig) -> Checkpoint:
    """The checkpoint that a config names, with its overrides."""
    frontend = config.frontend
    return open_checkpoint(
        frontend.checkpoint, frontend.type, frontend.overrides, instruct=frontend.instruct, head=frontend.head
    )


def export_record(config: CompileConfig, checkpoint: Checkpoint) -> GraphsRecord:
    """The record of the graphs that an export makes."""
    shape = Shape(
        batch=config.shape.batch, prefill_chunks=config.shape.prefill_chunks, cache_len=config.shape.cache_len
    )
    quantization = quantization_of(config)
    rules = FormatRules(
        quantization, STORAGE[config.backend.dtype], checkpoint.model.tied_embeddings, checkpoint.model.n_layers
    )
    return GraphsRecord(
        name=config.name,
        model=checkpoint.model,
        shape=shape,
        quantization=quantization,
        graphs=make_graphs(checkpoint.model, shape, CACHE_STORAGE[config.cache_dtype]),
        tensors=tuple(rules.tensor(name, checkpoint.shape(name)) for name in checkpoint.names()),
        tokenizer=_tokenizer_spec(checkpoint.tokenizer) if checkpoint.tokenizer else None,
        overrides={
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config.frontend.overrides.items()
        },
        source_bytes=checkpoint.source_bytes,
    )


def quantization_of(config: CompileConfig) -> Quantization:
    """How the config stores weights."""
    q = config.quantize
    return Quantization(
        scheme=q.scheme, group_size=q.group_size, symmetric=q.symmetric, keep=q.keep, keep_scheme=q.keep_scheme
    )


def _tokenizer_spec(source: TokenizerSource) -> TokenizerSpec:
    return TokenizerSpec(
        kind=source.kind,
        file=TOKENIZER_FILES[source.kind],
        bos_id=source.bos_id,
        add_bos=source.add_bos,
        eos_ids=source.eos_ids,
        chat_template=CHAT_TEMPLATE_FILE if source.chat_template is not None else None,
        instruct=source.instruct,
        end_id=source.end_id,
    )


def export_key(config: CompileConfig) -> str:
    """Identifies an export: what it reads of the config, the checkpoint's files, our code and the tools; opens no checkpoint."""
    inputs = {
        "name": config.name,
        "type": config.frontend.type,
        "instruct": config.frontend.instruct,
        "head": config.frontend.head,
        "overrides": dict(config.frontend.overrides),
        "shape": config.shape.model_dump(mode="json"),
        "quantize": config.quantize.model_dump(mode="json"),
        "dtype": config.backend.dtype,
        "checkpoint": identity(checkpoint_files(config.frontend.checkpoint)),
    }
    return stage_key(inputs, "export.pipeline", EXPORT_TOOLS)


def golden_key(config: CompileConfig) -> str:
    """Identifies the golden prompts of an export."""
    return stage_key({"graphs": export_key(config)}, "export.golden", ("torch", "numpy"))


def workspace_of(config: CompileConfig, artifact: Path) -> Path:
    """Where the stages of one config keep their results."""
    return config.workspace.path / artifact.name
