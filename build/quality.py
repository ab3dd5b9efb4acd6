"""`python -m build.quality yaml/x.yaml`: what each scheme costs in quality, as perplexity on a fixed English text (Carroll, 1865, first pages)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from build.variants import compile_variant
from export.config import config_parser
from export.console import output, step_bar
from runtime.engine import Engine
from runtime.errors import UserError, run_command
from runtime.tokenizer import open_tokenizer

TEXT = Path(__file__).parent / "english.txt"
SCHEMES = ("none", "int8")  # the first is what the others are compared with


@dataclass(frozen=True)
class Quality:
    """How well one scheme predicts the text."""

    scheme: str
    tokens: int
    perplexity: float  # exp of the mean negative log-likelihood per token
    divergence: float  # mean Kullback-Leibler divergence from the first scheme, nats per token
    agreement: float  # share of positions with the same most likely token as the first scheme
    weight_bytes: int


def main() -> int:
    """Compile, measure, print; returns the exit status."""
    arguments = config_parser("Compare the quality of weight schemes.").parse_args()
    folders = {
        scheme: compile_variant(arguments.config, arguments.overrides, scheme, [f"quantize.scheme={scheme}"]).artifact.folder for scheme in SCHEMES
    }
    output.print(table(measure(folders)))
    return 0


def measure(folders: dict[str, Path]) -> list[Quality]:
    """Run every artifact token by token over the text; the first one is the baseline."""
    ids = text_ids(next(iter(folders.values())))
    baseline: NDArray[np.float32] | None = None
    results = []
    with step_bar("reading the text", len(folders) * (len(ids) - 1)) as bar:
        for scheme, folder in folders.items():
            engine = Engine.open(folder)
            scores = np.empty((len(ids) - 1, engine.manifest.model.vocab_size), np.float32)
            for i, token_id in enumerate(ids[:-1]):
                scores[i] = log_softmax(engine.decode([token_id])[0])
                bar.advance(1)
            baseline = scores if baseline is None else baseline
            results.append(_quality(scheme, scores, baseline, np.array(ids[1:]), (folder / "weights.safetensors").stat().st_size))
    return results


def text_ids(folder: Path) -> list[int]:
    """The text in the artifact's tokens, as far as its caches hold it."""
    engine = Engine.open(folder)
    if engine.manifest.tokenizer is None or engine.batch != 1:
        raise UserError(f"{folder} has no tokenizer or a batch of {engine.batch}; quality needs a tokenizer and shape.batch: 1")
    ids = open_tokenizer(engine.manifest.tokenizer, folder).encode(TEXT.read_text())
    return ids[: engine.room()]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of logits (vocab,), in float64."""
    shifted = logits.astype(np.float64) - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _quality(scheme: str, scores: NDArray[np.float32], baseline: NDArray[np.float32], targets: NDArray[np.int64], nbytes: int) -> Quality:
    likelihood = scores[np.arange(len(targets)), targets].astype(np.float64)
    divergence = (np.exp(baseline, dtype=np.float64) * (baseline - scores)).sum(-1).mean()
    agreement = (scores.argmax(-1) == baseline.argmax(-1)).mean()
    return Quality(scheme, len(targets), float(np.exp(-likelihood.mean())), float(divergence), float(agreement), nbytes)


def table(results: list[Quality]) -> Table:
    """One row a scheme."""
    result = Table(title=f"quality on {results[0].tokens} tokens of English", title_justify="left")
    result.add_column("scheme")
    for name in ("perplexity", "change", "KL divergence", "same top-1", "weights"):
        result.add_column(name, justify="right")
    for row in results:
        change = f"{row.perplexity / results[0].perplexity - 1:+.2%}"
        numbers = (f"{row.perplexity:.3f}", change, f"{row.divergence:.5f}", f"{row.agreement:.2%}", f"{row.weight_bytes / 1e6:,.1f} MB")
        result.add_row(row.scheme, *numbers)
    return result


if __name__ == "__main__":
    run_command(main)
