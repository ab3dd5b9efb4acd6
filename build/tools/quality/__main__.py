"""`python -m build.tools.quality yaml/x.yaml`: measure what each way of storing weights costs in quality.

Each variant is compared with float32 on two fixed texts of different kinds, or on a file, and so is llama.cpp with the
same GGUF where it is installed. All of them read `ROWS` passages side by side and advance in step, so that no
distribution has to be kept. Exit status 1 if the config's own scheme costs more perplexity than `quantize.budget`
allows.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from build.tools.quality.figures import Quality
from build.tools.quality.llama import llama_contestants
from build.tools.quality.measuring import Contestant, measure
from build.tools.quality.report import by_text, draw_errors, draw_quality, tables
from build.tools.quality.stored import described, is_quantized, layer_errors, packings
from build.tools.quality.texts import ROWS, Passages, check_chunks, chunks, open_texts, whole_rows
from build.tools.variants import BASELINE, VARIANTS, Variant, compile_variant, fitting_variants
from export.calibration.fixed_text import LENGTH, Text
from export.checkpoints.checkpoint import Checkpoint
from export.configuration.config import CompileConfig, config_parser
from export.console import output, step_bar
from export.job import Job
from export.results import open_configured, quantization_of, weights_folder
from export.weights.stored import StoredWeights
from runtime.artifact.consistency import WEIGHTS_FILE
from runtime.artifact.targets import TARGETS
from runtime.engines.engine import Engine
from runtime.engines.side_by_side import SideBySide
from runtime.errors import UserError, run_command
from runtime.text.tokenizer import open_tokenizer

OWN = "this config"
OVER_BUDGET = 1  # exit status
CHUNK = 128  # tokens of a prefill, where passages begin with context that is not scored


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
    check_chunks(arguments.context, arguments.chunks)
    texts = open_texts(arguments.text)
    checkpoint = open_configured(config)
    stored = packings(checkpoint)
    fitting = fitting_variants(job, is_quantized=is_quantized(checkpoint))
    wanted = fitting if arguments.variants is None else arguments.variants.split(",")
    variants = compile_variants(job, wanted, described(BASELINE, stored), arguments.context)
    errors = errors_of(checkpoint, variants)  # first: the long part is then the last that can fail
    results = measure_variants(config, variants, texts, arguments)
    write_report(arguments.config.stem, results, stored, errors)
    return check_budget(results, config.quantize.budget)


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    result = config_parser("Compare the quality of weight schemes.")
    result.add_argument(
        "--variants",
        metavar="A,B",
        help=f"variants to compare with {BASELINE} and the config (default: those that fit the checkpoint of "
        f"{', '.join(VARIANTS)})",
    )
    result.add_argument("--text", type=Path, metavar="FILE", help="a text in UTF-8, in place of the two fixed ones")
    result.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="cut the text into chunks of N tokens and score the second half of each, as llama.cpp does (N=512 is the "
        f"convention for WikiText-2); default: up to {ROWS * LENGTH} tokens, in {ROWS} rows that are scored in full",
    )
    result.add_argument("--chunks", type=int, metavar="N", help="at most N chunks, with --context (default: all)")
    result.add_argument("--no-llama", action="store_true", help="leave llama.cpp out")
    return result


def compile_variants(job: Job, wanted: Sequence[str], baseline: str, context: int | None) -> dict[str, Variant]:
    """Compile every variant for `ROWS` sequences, the baseline first; `baseline` is what it is called.

    The config as it is comes last, unless it is one of the variants. `context` is the length of the chunks, if any.
    """
    labels = [BASELINE, *(label for label in wanted if label != BASELINE)]
    unknown = [label for label in labels if label not in VARIANTS]
    if unknown:
        raise UserError(f"--variants names {unknown[0]}, expected some of {', '.join(VARIANTS)}")
    changes = {label: VARIANTS[label] for label in labels}
    same = [label for label in labels if _stores(job.changed(changes[label]).config) == _stores(job.config)]
    chunk = 16 if context is None else min(CHUNK, context // 2)
    shape = [f"shape.slots={ROWS}", f"shape.cache_len={context or LENGTH}", f"shape.prefill_chunk={chunk}"]
    shape.append("backend.cpu=native")  # they run here and nowhere else
    names = {label: baseline if label == BASELINE else label for label in labels}
    variants = {
        f"{names[label]} ({OWN})" if label in same else names[label]: compile_variant(
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


def measure_variants(
    config: CompileConfig, variants: Mapping[str, Variant], texts: Sequence[Text], arguments: argparse.Namespace
) -> list[Quality]:
    """The figures of all variants, and of llama.cpp if it can take part, on each text."""
    folders = {label: variant.artifact.folder for label, variant in variants.items()}
    engines = {label: Engine.open(folder) for label, folder in folders.items()}
    first = next(iter(engines.values()))
    passages = {text.name: passages_of(text, first, arguments.context, arguments.chunks) for text in texts}
    with contestants(config, engines, llama=not arguments.no_llama, slots=arguments.context or LENGTH) as readers:
        return [row for name, each in passages.items() for row in read_text(readers, name, each)]


@contextmanager
def contestants(
    config: CompileConfig, engines: Mapping[str, Engine], *, llama: bool, slots: int
) -> Iterator[dict[str, Contestant]]:
    """Our engines, and llama.cpp on the same checkpoint with caches of `slots`."""
    ours = {
        label: Contestant(SideBySide(engine, ROWS), (engine.folder / WEIGHTS_FILE).stat().st_size)
        for label, engine in engines.items()
    }
    if not llama:
        yield ours
        return
    vocab_size = next(iter(engines.values())).manifest.model.vocab_size
    with llama_contestants(config, slots, vocab_size) as theirs:
        yield {**ours, **theirs}


def passages_of(text: Text, engine: Engine, context: int | None, most: int | None) -> Passages:
    """The passages of a text for an engine's vocabulary, batch and caches.

    Raises `UserError` if it has no tokenizer, and for a text that is too short.
    """
    if engine.manifest.tokenizer is None:
        raise UserError(
            f"{engine.folder} has no tokenizer, which is needed to read the text; use a checkpoint with a tokenizer"
        )
    tokenizer = open_tokenizer(engine.manifest.tokenizer, engine.folder)
    if context is not None:
        return chunks(text, tokenizer, context, most)
    return whole_rows(text, tokenizer, ROWS, engine.manifest.shape.cache_len if engine.room(0) else LENGTH)


def read_text(readers: Mapping[str, Contestant], name: str, passages: Passages) -> list[Quality]:
    """The figures of all contestants on one text, with a progress bar."""
    with step_bar(f"reading {name}", passages.scored) as bar:
        return measure(readers, name, passages, bar.advance)


def errors_of(checkpoint: Checkpoint, variants: Mapping[str, Variant]) -> dict[str, dict[str, list[float]]]:
    """The layer errors of all variants that have any."""
    found = {
        label: layer_errors(checkpoint, StoredWeights.open(weights_folder(variant.job)))
        for label, variant in variants.items()
    }
    return {label: errors for label, errors in found.items() if errors}


def write_report(
    stem: str, results: Sequence[Quality], stored: Sequence[str], errors: Mapping[str, dict[str, list[float]]]
) -> None:
    """Write the JSON file and the plots, and print the tables."""
    folder = Path("out/quality")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"stored": list(stored), "quality": [asdict(row) for row in results], "layer_errors": errors}
    (folder / f"{stem}.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw_quality(results, folder / f"{stem}.svg")
    files = [f"{stem}.json", f"{stem}.svg"]
    if errors:
        files.append(f"{stem}-layers.svg")
        draw_errors(errors, folder / files[-1])
    for rows in by_text(results).values():
        for table in tables(rows):
            output.print(table)
    output.print(f"figures and plots in {folder}: {', '.join(files)}")


def check_budget(results: Sequence[Quality], budget: float | None) -> int:
    """Say whether the config keeps within its budget (percent of perplexity) on every text; returns the exit status."""
    if budget is None:
        return 0
    within = True
    for text, rows in by_text(results).items():
        own = next(row for row in rows if OWN in row.variant)
        change = 100 * (own.perplexity.value / rows[0].perplexity.value - 1)
        kept = change <= budget
        within &= kept
        output.print(
            f"quantize.budget: {change:+.3f} % of perplexity on {text}, "
            f"{'within' if kept else 'more than'} the {budget:g} % that the config allows"
        )
    return 0 if within else OVER_BUDGET


if __name__ == "__main__":
    run_command(main)
