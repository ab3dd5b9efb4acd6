"""The contenders of the bench: each is a command that measures one engine once in its own process and prints JSON."""

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from build.tools.llama_files import AS_IT_IS, EIGHT_BITS, FOUR_BITS
from export.configuration.config import CompileConfig
from export.job import Job
from runtime.bench import Workload
from runtime.engines.cpu_level import VARIABLE

BEST = "best"  # the level of code that an engine chooses by itself
OURS, ONNXRUNTIME, TRANSFORMERS, LLAMA, GENAI = "ours", "onnxruntime", "transformers", "llama.cpp", "ORT GenAI"
# What is compared with each other: numbers of as many bits.
WIDE, HALF, BYTE, NIBBLE, SAME_FILE = "32 bits", "16 bits", "8 bits", "4 bits", "the same file"


@dataclass(frozen=True)
class OurScheme:
    """One of our schemes: what is set, beside whom it belongs, and the row of `build.bench.formats.FORMATS` it uses."""

    variant: str  # of `build.tools.variants.VARIANTS`
    bits: str
    format: str
    cache: str | None = None  # dtype of caches, if it is not the variant's


SCHEMES: Mapping[str, OurScheme] = {
    "fp32": OurScheme("fp32", WIDE, "float32"),
    "bf16": OurScheme("bf16", HALF, "bfloat16"),
    "bf16_dot": OurScheme("bf16_dot", HALF, "bf16_dot"),
    "fp16": OurScheme("fp16", HALF, "float16"),
    "source": OurScheme("source", SAME_FILE, "int4_int16", cache="fp16"),
    "source_dynamic": OurScheme("source_dynamic", SAME_FILE, "int4_dynamic", cache="fp16"),
    "int8": OurScheme("int8", BYTE, "int8", cache="fp16"),
    "int8_dynamic": OurScheme("int8_dynamic", BYTE, "int8_dynamic", cache="fp16"),
    "int8_dynamic-int8_cache": OurScheme("int8_dynamic", BYTE, "int8_dynamic", cache="int8"),
    "int4": OurScheme("int4", NIBBLE, "int4", cache="fp16"),
    "int4_dynamic": OurScheme("int4_dynamic", NIBBLE, "int4_dynamic", cache="fp16"),
}
RIVAL_SCHEMES: Mapping[str, Mapping[str, str]] = {  # what each rival stores, in its own terms, and its bits
    ONNXRUNTIME: {"fp32": WIDE, "int8": BYTE},  # our graphs
    TRANSFORMERS: {"fp32": WIDE},
    LLAMA: {AS_IT_IS: SAME_FILE, "F32": WIDE, "F16": HALF, EIGHT_BITS: BYTE, FOUR_BITS: NIBBLE},
    GENAI: {"fp32": WIDE, "int4": NIBBLE},
}


@dataclass(frozen=True)
class Task:
    """The work that every contender is asked to do, and the levels of code that ours does it with."""

    workload: Workload
    threads: int
    levels: tuple[str, ...] = (BEST,)  # see `build.bench.levels`


@dataclass(frozen=True)
class PeakShare:
    """The peak that limits a prefill: its level and name, and how often it does each multiplication that counts."""

    level: str
    name: str
    times: int


@dataclass(frozen=True)
class Contender:
    """The engine, how it stores weights, and the command that measures it once and prints JSON."""

    what: str
    scheme: str
    command: tuple[str, ...]
    compile_s: float | None = None  # only for ours
    model: str = ""  # empty: the config's own
    level: str = BEST  # of the code of ours: the best, or LLVM's name of one that is forced
    peak: PeakShare | None = None
    operations: float = 0.0  # multiplications and additions of all matrices for one token of a prompt
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name by which it is asked for, whatever the level: a scheme, or a rival with its own."""
        return " ".join(part for part in (self.model, "" if self.what == OURS else self.what, self.scheme) if part)

    @property
    def label(self) -> str:
        """Its name among the others; of ours, with the level that is forced."""
        forced = self.peak.level if self.peak is not None and self.level != BEST else ""
        return ", ".join(part for part in (f"{self.what} {self.scheme}", self.model, forced) if part)

    @property
    def bits(self) -> str:
        """What it is compared with."""
        return SCHEMES[self.scheme].bits if self.what == OURS else RIVAL_SCHEMES[self.what][self.scheme]


def compiled(job: Job, scheme: str, task: Task, operations: float, model: str = "") -> tuple[list[Contender], Job]:
    """Our contenders of one scheme, at each level, and the job that compiled the artifact.

    `operations` are those of `flops_per_token`.
    """
    # These load TVM's compiler, which the workers must not.
    from build.bench.levels import held_levels
    from build.tools.variants import VARIANTS, compile_variant

    own, config, workload = SCHEMES[scheme], job.config, task.workload
    shape = [] if _windowed(config) else [f"shape.cache_len={max(config.shape.cache_len, workload.slots)}"]
    cache = [] if own.cache is None else [f"quantize.cache={own.cache}"]
    start = time.monotonic()
    name = "-".join(part for part in ("bench", model.lower(), scheme) if part)
    # Only the levels that run here are compiled.
    levels = f"backend.cpu=[{','.join('native' if level == BEST else level for level in task.levels)}]"
    variant = compile_variant(job, name, [*shape, *VARIANTS[own.variant], *cache, levels])
    seconds = time.monotonic() - start
    command = our_command(variant.artifact.folder, task)
    held = held_levels(task.levels, variant.artifact.manifest.target.levels)
    rows = workload.prompt_tokens[0]
    entries = [
        Contender(
            *(OURS, scheme, command, seconds, model, level),
            peak=_peak(level, own.format, rows),
            operations=operations,
            environment={} if level == BEST else {VARIABLE: level},
        )
        for level in held
    ]
    return entries, variant.job


def _peak(level: str, format_name: str, rows: int) -> PeakShare:
    from build.bench.formats import FORMATS
    from build.bench.levels import kernel_level
    from build.kernels.cpu.limits import peak_of

    found = kernel_level(level)
    return PeakShare(found.name, *peak_of(found, FORMATS[format_name], rows))


def our_command(artifact: Path, task: Task) -> tuple[str, ...]:
    """The command of the box that measures an artifact once."""
    workload = task.workload
    flags = {
        "--prompt-tokens": _joined(workload.prompt_tokens),
        "--context": _joined(workload.contexts),
        "--tokens": str(workload.steps),
        "--repeats": str(workload.repeats),
        "--threads": str(task.threads),
    }
    return (
        *(sys.executable, "-m", "runtime.bench", str(artifact), "--json"),
        *(part for pair in flags.items() for part in pair),
    )


def rival_command(module: str, weights: Path, task: Task, *more: str) -> tuple[str, ...]:
    """The command that measures a rival once."""
    workload = msgspec.json.encode(task.workload).decode()
    return (sys.executable, "-m", f"build.bench.{module}", str(weights), workload, str(task.threads), *more)


def is_quantized(config: CompileConfig) -> bool:
    """Whether the config's checkpoint has quantized matrices, which can be carried."""
    from export.results import open_configured

    checkpoint = open_configured(config)
    return any(checkpoint.packings(name) for name in checkpoint.names())


def flops_per_token(config: CompileConfig) -> float:
    """Multiplications and additions of all matrices for one token of a prompt.

    The head, which sees only the last token, is left out.
    """
    from export.results import open_configured

    checkpoint = open_configured(config)
    sizes = [checkpoint.shape(name) for name in checkpoint.names() if name.startswith("layers.")]
    return 2.0 * sum(shape[0] * shape[1] for shape in sizes if len(shape) > 1)


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _windowed(config: CompileConfig) -> bool:
    """Whether the config forces a window on all layers, so that no context is too long."""
    return isinstance(config.frontend.overrides.get("sliding_window"), int)
