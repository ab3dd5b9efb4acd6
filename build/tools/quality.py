"""`python -m build.tools.quality yaml/x.yaml`: measure what each way of storing weights costs in quality.

Each is compared with float32 on a fixed English text: the first pages of Newton's Opticks (4th edition, 1730, Project
Gutenberg), which the pinned package `apache-tvm-ffi` carries as test data. The text is cut into `ROWS` sequences that a
batch reads side by side. All variants advance in step, so that no distribution has to be kept. Exit status 1 if the
config's own scheme costs more perplexity than `quantize.budget` allows.
"""

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from build.tools.quality_report import Quality, draw_errors, draw_quality, table
from build.tools.variants import BASELINE, VARIANTS, Variant, compile_variant
from export.checkpoints.checkpoint import Checkpoint
from export.configuration.config import CompileConfig, config_parser
from export.console import output, step_bar
from export.job import Job
from export.results import open_configured, quantization_of, weights_folder
from export.weights.stored import StoredWeights
from export.weights.table import format_of, load, specs
from runtime.artifact.targets import TARGETS
from runtime.engines.engine import Engine
from runtime.errors import UserError, run_command
from runtime.text.tokenizer import open_tokenizer

ROWS, LENGTH = 8, 1024  # sequences, and predicted tokens in each: 8192 in all
TEXT = ("tvm_ffi", "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt")
TEXT_SHA256 = "d4a9ac22462b35e7821a4f2706c211093da678620a8f9997989ee7cf8d507bbd"
TEXT_START = "DEFIN. I."  # what comes before is front matter
OWN = "this config"
OVER_BUDGET = 1  # exit status


@dataclass
class Sums:
    """Sums over the text for one variant."""

    likelihood: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, scores: NDArray[np.float64], baseline: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
        """Add log-probabilities (rows, vocab) of this variant and of the baseline for the tokens that came (rows,)."""
        self.likelihood += float(scores[np.arange(len(targets)), targets].sum())
        self.divergence += float((np.exp(baseline) * (baseline - scores)).sum())
        self.agreed += int((scores.argmax(-1) == baseline.argmax(-1)).sum())
        self.tokens += len(targets)

    def quality(self, variant: str, weight_bytes: int) -> Quality:
        """Means over the text."""
        perplexity = float(np.exp(-self.likelihood / self.tokens))
        return Quality(
            variant, self.tokens, perplexity, self.divergence / self.tokens, self.agreed / self.tokens, weight_bytes
        )


def main() -> int:
    """Compile, measure, print and draw; returns the exit status."""
    arguments = parser().parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    config = job.config
    if TARGETS[config.backend.target].on_device:
        raise UserError(
            f"backend.target is {config.backend.target}, expected a target that runs here; "
            "add --set backend.target=llvm"
        )
    variants = compile_variants(job, arguments.variants)
    results = measure({label: variant.artifact.folder for label, variant in variants.items()})
    folder = Path("out/quality")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_configured(config)
    errors = {
        label: found
        for label, variant in variants.items()
        if (found := layer_errors(checkpoint, StoredWeights.open(weights_folder(variant.job))))
    }
    stem = arguments.config.stem
    (folder / f"{stem}.json").write_text(
        json.dumps({"quality": [asdict(row) for row in results], "layer_errors": errors}, indent=1) + "\n"
    )
    draw_quality(results, folder / f"{stem}.svg")
    files = [f"{stem}.json", f"{stem}.svg"]
    if errors:
        files.append(f"{stem}-layers.svg")
        draw_errors(errors, folder / files[-1])
    output.print(table(results))
    output.print(f"figures and plots in {folder}: {', '.join(files)}")
    return check_budget(results, config.quantize.budget)


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    result = config_parser("Compare the quality of weight schemes.")
    names = ",".join(VARIANTS)
    result.add_argument(
        "--variants",
        default=names,
        metavar="A,B",
        help=f"variants to compare with {BASELINE} and the config (default: {names})",
    )
    return result


def compile_variants(job: Job, wanted: str) -> dict[str, Variant]:
    """Compile every variant for `ROWS` sequences, the baseline first.

    The config as it is comes last, unless it is one of the variants.
    """
    labels = [BASELINE, *(label for label in wanted.split(",") if label != BASELINE)]
    unknown = [label for label in labels if label not in VARIANTS]
    if unknown:
        raise UserError(f"--variants names {unknown[0]}, expected some of {', '.join(VARIANTS)}")
    changes = {label: VARIANTS[label] for label in labels}
    same = [label for label in labels if _stores(job.changed(changes[label]).config) == _stores(job.config)]
    shape = [f"shape.batch={ROWS}", f"shape.cache_len={LENGTH}", "shape.prefill_chunk=16"]
    variants = {
        f"{label} ({OWN})" if label in same else label: compile_variant(
            job, f"quality-{label}", [*shape, *changes[label]]
        )
        for label in labels
    }
    if not same:
        variants[OWN] = compile_variant(job, "quality-own", shape)
    return variants


def _stores(config: CompileConfig) -> tuple[object, ...]:
    """How a config stores weights and caches."""
    return quantization_of(config).label, config.backend.dtype, config.cache_dtype


def measure(folders: Mapping[str, Path]) -> list[Quality]:
    """Run all artifacts over the text, step by step; the first one is the baseline."""
    engines = {label: Engine.open(folder) for label, folder in folders.items()}
    rows = text_rows(next(iter(folders.values())), next(iter(engines.values())))
    sums = {label: Sums() for label in engines}
    with step_bar("reading the text", rows.shape[1] - 1) as bar:
        for i in range(rows.shape[1] - 1):
            baseline: NDArray[np.float64] | None = None
            for label, engine in engines.items():
                scores = log_softmax(engine.decode(rows[:, i].tolist()))
                baseline = scores if baseline is None else baseline
                sums[label].add(scores, baseline, rows[:, i + 1])
            bar.advance(1)
    return [
        sums[label].quality(label, (folder / "weights.safetensors").stat().st_size) for label, folder in folders.items()
    ]


def text_rows(folder: Path, engine: Engine) -> NDArray[np.int64]:
    """The text's token ids as (rows, length + 1) for the engine's batch.

    Each row continues where the previous one ends, and fits in the caches.
    """
    if engine.manifest.tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer, which is needed to read the text; use a checkpoint with a tokenizer"
        )
    length = min(LENGTH, engine.room() or LENGTH)
    ids = open_tokenizer(engine.manifest.tokenizer, folder).encode(text())
    wanted = engine.batch * length + 1
    if len(ids) < wanted:
        raise UserError(f"the text has {len(ids)} tokens, expected at least {wanted}")
    return np.stack([ids[row * length : (row + 1) * length + 1] for row in range(engine.batch)])


def text() -> str:
    """Read the English text, and check that it is the expected one."""
    package, member = TEXT
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / member if spec and spec.origin else Path(package) / member
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != TEXT_SHA256:
        raise UserError(
            f"{path} is not the text that quality is measured on; install the pinned packages again with `make setup`"
        )
    whole = data.decode("utf-8").replace("\r\n", "\n")
    return whole[whole.index(TEXT_START) :]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of logits (rows, vocab), in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def layer_errors(checkpoint: Checkpoint, weights: StoredWeights) -> dict[str, list[float]]:
    """Error of each layer's stored matrices by kind: |stored - checkpoint| / |checkpoint|, in Frobenius norms."""
    source = weights.tensors()
    errors: dict[str, list[float]] = {}
    for tensor in weights.record.tensors:
        if format_of(tensor.stored).scaled:
            exact = checkpoint.tensor(tensor.name).astype(np.float32)
            stored = load(tensor, {spec.name: source.read(spec.name) for spec in specs(tensor)})
            kind = tensor.name.removesuffix(".weight").split(".")[-1]
            errors.setdefault(kind, []).append(float(np.linalg.norm(stored - exact) / np.linalg.norm(exact)))
    return errors


def check_budget(results: Sequence[Quality], budget: float | None) -> int:
    """Say whether the config keeps within its budget (percent of perplexity); returns the exit status."""
    if budget is None:
        return 0
    own = next(row for row in results if OWN in row.variant)
    change = 100 * (own.perplexity / results[0].perplexity - 1)
    kept = change <= budget
    output.print(
        f"quantize.budget: {change:+.3f} % of perplexity, "
        f"{'within' if kept else 'more than'} the {budget:g} % that the config allows"
    )
    return 0 if kept else OVER_BUDGET


if __name__ == "__main__":
    run_command(main)
