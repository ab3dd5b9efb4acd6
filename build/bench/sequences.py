"""Several sequences side by side: ours in the slots of an artifact, and llama.cpp with as many parallel sequences."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from build.bench.contenders import LLAMA, OURS, is_quantized
from build.bench.processes import json_of
from build.tools.llama_files import AS_IT_IS, EIGHT_BITS
from export.console import console
from export.job import Job
from runtime.benchmarks.sequences import SequencesReport, SequencesWorkload

COUNTS = (1, 2, 4, 8, 16)
CONTEXTS = (64, 1024)
PAIRS = {"source": AS_IT_IS, "int8": EIGHT_BITS, "fp32": "F32"}  # our schemes, and what llama.cpp stores beside each


@dataclass(frozen=True)
class SequencesContender:
    """An engine, how it stores weights, and the command that measures all numbers of sequences once, as JSON."""

    what: str
    scheme: str
    command: tuple[str, ...]

    @property
    def label(self) -> str:
        """Its name in a table."""
        return f"{self.what} {self.scheme}"


class Case(NamedTuple):
    """A contender, by its label, with so many sequences behind so many tokens of context."""

    label: str
    context: int
    sequences: int


Samples = Mapping[Case, Sequence[float]]  # tokens per second, round by round


def sequences_contenders(job: Job, workload: SequencesWorkload, threads: int) -> list[SequencesContender]:
    """Compile the schemes of `PAIRS` with enough slots; each is followed by its rival if llama.cpp can take part."""
    from build.tools.quality.llama import reason_to_leave_out
    from build.tools.variants import VARIANTS, compile_variant, fitting_variants  # these load TVM's compiler

    reason = reason_to_leave_out(job.config)
    if reason is not None:
        console.print(f"{LLAMA} is left out: {reason}")
    fitting = fitting_variants(job, is_quantized=is_quantized(job.config))
    asked = msgspec.json.encode(workload).decode()
    found = []
    for scheme, kind in PAIRS.items():
        if scheme not in fitting:
            continue
        cache = [] if "quantize.scheme=none" in VARIANTS[scheme] else ["quantize.cache=fp16"]
        shape = [f"shape.slots={max(workload.counts)}", "shape.step_rows=null", f"shape.cache_len={workload.columns}"]
        here = "backend.cpu=native"  # they run here and nowhere else
        variant = compile_variant(job, f"bench-slots-{scheme}", [*shape, *VARIANTS[scheme], *cache, here])
        found.append(SequencesContender(OURS, scheme, our_command(variant.artifact.folder, workload, threads)))
        if reason is None:
            module = "build.bench.rival_llama_sequences"
            rival = (sys.executable, "-m", module, str(job.config.frontend.checkpoint), asked, str(threads), kind)
            found.append(SequencesContender(LLAMA, kind, rival))
    return found


def our_command(artifact: Path, workload: SequencesWorkload, threads: int) -> tuple[str, ...]:
    """The command of the box that measures this workload."""
    flags = {
        "--sequences": ",".join(map(str, workload.counts)),
        "--context": ",".join(map(str, workload.contexts)),
        "--tokens": str(workload.steps),
        "--repeats": str(workload.repeats),
        "--threads": str(threads),
    }
    return (
        *(sys.executable, "-m", "runtime.bench", str(artifact), "--json"),
        *(part for pair in flags.items() for part in pair),
    )


def run_sequences(contenders: Sequence[SequencesContender], rounds: int) -> Samples:
    """Run each contender once per round, in order."""
    samples: dict[Case, list[float]] = {}
    for number in range(rounds):
        for contender in contenders:
            console.print(f"round {number + 1} of {rounds}: {contender.label}, side by side", style="dim")
            report = msgspec.json.decode(json_of(contender.command, contender.label), type=SequencesReport)
            for speed in report.speeds:
                case = Case(contender.label, speed.context, speed.sequences)
                samples.setdefault(case, []).append(speed.tok_s)
    return samples
