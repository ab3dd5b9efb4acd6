"""`python -m export.parity yaml/x.yaml`: check that transformers == static torch == onnxruntime.

Also saves a trace for the build stage to replay.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import psutil
import torch

from export.checkpoints.checkpoint import Checkpoint
from export.configuration.config import CompileConfig, config_parser
from export.console import step_bar
from export.job import Job
from export.onnx_graphs.graphs import OnnxGraphs
from export.proof.ladder import (
    ROWS_FILE,
    TRACE_FILE,
    Case,
    Logits,
    compare,
    make_cases,
    pairs_with,
    save_trace,
    ways_agree,
)
from export.proof.reference_model import load_reference, reference_logits
from export.proof.steppers import OnnxStepper, Stepper, TorchStepper, checkpoint_weights, static_model, stored_weights
from export.results import graphs_path, open_configured
from runtime.artifact.bounds import relative_bound
from runtime.artifact.manifest import ModelConfig, ParityRow
from runtime.errors import UserError, run_command

COPIES = 3  # of the float32 weights held by a rung at worst: the reader's, the model's and a tied or fused copy


def main() -> int:
    """Run the rungs and return the exit status."""
    arguments = config_parser("Compare transformers, the static model and onnxruntime.").parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    checkpoint = open_configured(job.config)
    check_memory(checkpoint)
    rows = run_rungs(job.config, checkpoint, OnnxGraphs.open(graphs_path(job)), job.workspace / TRACE_FILE)
    (job.workspace / ROWS_FILE).write_bytes(msgspec.json.encode(rows))
    return 0


def check_memory(checkpoint: Checkpoint) -> None:
    """Refuse a model whose float32 copies cannot fit in this machine's memory."""
    needed = COPIES * 4 * sum(int(torch.Size(checkpoint.shape(name)).numel()) for name in checkpoint.names())
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"parity holds the model in float32 and needs about {needed / 1e9:.0f} GB, "
            f"but this machine has {available / 1e9:.0f} GB free; "
            "run it on a larger machine, or on a checkpoint of the same shape with fewer layers"
        )


def run_rungs(config: CompileConfig, checkpoint: Checkpoint, graphs: OnnxGraphs, trace: Path) -> list[ParityRow]:
    """Both rungs, with the onnxruntime answers saved to `trace`."""
    record = graphs.record
    cases = make_cases(record.model, record.shape)
    exact = relative_bound(record.model, record.shape.cache_len, "fp32")
    stored = relative_bound(record.model, record.shape.cache_len, config.cache_dtype, record.quantization.rounding)
    with step_bar("parity", 4 * len(cases)) as bar:
        reference = _reference_answers(config, record.model, cases, bar.advance)
        static = static_model(record.model, record.shape.cache_len, checkpoint_weights(checkpoint))
        torch_answers = answer(TorchStepper(static, "float32"), cases, bar.advance)
        del static
        effective = static_model(record.model, record.shape.cache_len, stored_weights(graphs), graphs.rounded_weights())
        effective_answers = answer(TorchStepper(effective, record.cache_dtype), cases, bar.advance)
        del effective
        onnx_answers = answer(OnnxStepper(graphs), cases, bar.advance)
    save_trace(trace, cases, onnx_answers)
    return [
        compare(
            "1", "transformers and static torch, checkpoint weights", pairs_with(cases, torch_answers, reference), exact
        ),
        compare(
            "2",
            "static torch and onnxruntime, stored weights",
            pairs_with(cases, onnx_answers, effective_answers),
            stored,
        ),
        compare("4", "onnxruntime: one by one, chunked and whole", ways_agree(cases, onnx_answers), stored),
    ]


def _reference_answers(
    config: CompileConfig, model_config: ModelConfig, cases: list[Case], advance: Callable[[int], None]
) -> list[list[Logits]]:
    """transformers' logits, or other outputs of its head, at the last token of each call; one pass per case."""
    frontend = config.frontend
    model = load_reference(frontend.checkpoint, frontend.type, model_config, frontend.adapter)
    answers = []
    for case in cases:
        nothing = np.zeros((1, model_config.n_outputs), np.float32)  # for rows of padding, which nobody compares
        rows = [
            reference_logits(model, ids[None], model_config.head)[0] if ids.size else nothing for ids in case.sequences
        ]
        answers.append(
            [np.stack([row[max(end, 0)] for row, end in zip(rows, ends, strict=True)]) for ends in case.ends()]
        )
        advance(1)
    return answers


def answer(stepper: Stepper, cases: list[Case], advance: Callable[[int], None]) -> list[list[Logits]]:
    """One implementation's logits for every case, each started with empty caches."""
    answers = []
    for case in cases:
        stepper.reset(len(case.sequences))
        answers.append(case.run(stepper.step))
        advance(1)
    return answers


if __name__ == "__main__":
    run_command(main)
