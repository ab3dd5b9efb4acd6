"""The contenders of the bench: each is a command that measures one engine once in its own process and prints JSON."""

import importlib.util
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from build.tools.llama_files import AS_IT_IS, EIGHT_BITS, FOUR_BITS
from build.tools.random_checkpoint import SHAPES, write_random_checkpoint
from export.configuration.config import CompileConfig
from export.console import console
from export.job import Job
from export.workspace import made_whole
from runtime.bench import Workload

OURS, ONNXRUNTIME, TRANSFORMERS, LLAMA, GENAI = "ours", "onnxruntime", "transformers", "llama.cpp", "ORT GenAI"
# Our schemes: rows of `build.tools.variants.VARIANTS`.
SCHEMES = ("fp32", "bf16", "fp16", "source", "source_dynamic", "int8", "int8_dynamic", "int4", "int4_dynamic")
RIVAL_SCHEMES = {  # what each rival stores, in its own terms
    ONNXRUNTIME: ("fp32", "int8"),  # our graphs
    TRANSFORMERS: ("fp32",),
    LLAMA: (AS_IT_IS, "F32", "F16", EIGHT_BITS, FOUR_BITS),
    GENAI: ("fp32", "int4"),
}
INSTALLED = {LLAMA: "llama_cpp", GENAI: "onnxruntime_genai"}  # modules that `make setup BENCH=1` installs
LARGE = "1.1b"  # a shape whose weights are far larger than any processor's cache
LARGE_SCHEME = "int8"
LARGE_LABEL = f"{LARGE_SCHEME}, {LARGE.upper()}"


@dataclass(frozen=True)
class Task:
    """The work that every contender is asked to do."""

    workload: Workload
    threads: int


@dataclass(frozen=True)
class Contender:
    """The engine, how it stores weights, and the command that measures it once and prints JSON."""

    what: str
    scheme: str
    command: tuple[str, ...]
    compile_s: float | None = None  # only for ours

    @property
    def label(self) -> str:
        """The name by which a rival is asked for."""
        return f"{self.what} {self.scheme}"


def contenders(job: Job, task: Task, *, large: bool, only: Collection[str] | None = None) -> list[Contender]:
    """Compile all schemes of the config, or those in `only`, and with `large` a random model of 1.1 B parameters.

    Returns our contenders and then the rivals, of which those in `only` if it is given; see `Contender.label`.
    """
    from build.tools.variants import fitting_variants  # loads TVM's compiler, which the workers must not

    large_checkpoint = _large_checkpoint(job.config.workspace.path) if large else None
    ours, theirs = [], []
    fitting = fitting_variants(job, is_quantized=is_quantized(job.config))
    for label in SCHEMES:
        if label not in fitting or (only is not None and label not in only):
            continue
        entry, variant = _compiled(job, label, task, f"bench-{label}")
        ours.append(entry)
        if label in RIVAL_SCHEMES[ONNXRUNTIME]:
            theirs.append(Contender(ONNXRUNTIME, label, _rival("rival_onnxruntime", _graphs(variant), task)))
    if large_checkpoint is not None:
        frontend = {
            "checkpoint": large_checkpoint,
            "type": "huggingface",
            "head": "auto",
            "instruct": "false",
            "overrides": "{}",
        }
        source = [f"name=random-{LARGE}", *(f"frontend.{key}={value}" for key, value in frontend.items())]
        short = replace(task, workload=replace(task.workload, contexts=task.workload.contexts[:1]))
        entry, _ = _compiled(job.changed(source), LARGE_SCHEME, short, f"bench-{LARGE}")
        ours.append(replace(entry, scheme=LARGE_LABEL))
    rivals = [*theirs, *_installed_rivals(job.config, task)]
    return [*ours, *(rival for rival in rivals if only is None or rival.label in only)]


def is_quantized(config: CompileConfig) -> bool:
    """Whether the config's checkpoint has quantized matrices, which can be carried."""
    from export.results import open_configured

    checkpoint = open_configured(config)
    return any(checkpoint.packings(name) for name in checkpoint.names())


def _large_checkpoint(workspace: Path) -> Path:
    """A random checkpoint with the sizes of `LARGE`, written now if it does not exist."""
    n_layers = int(SHAPES[LARGE]["num_hidden_layers"])
    return made_whole(workspace / f"random-{LARGE}", lambda folder: write_random_checkpoint(folder, LARGE, n_layers))


def _compiled(job: Job, scheme: str, task: Task, name: str) -> tuple[Contender, Job]:
    """Our contender, compiled as variant `name`, and the job that compiled it."""
    from build.tools.variants import VARIANTS, compile_variant  # these load TVM's compiler, which the workers must not

    config = job.config
    workload = task.workload
    shape = [] if _windowed(config) else [f"shape.cache_len={max(config.shape.cache_len, workload.slots)}"]
    cache = [] if "quantize.scheme=none" in VARIANTS[scheme] else ["quantize.cache=fp16"]
    start = time.monotonic()
    variant = compile_variant(job, name, [*shape, *VARIANTS[scheme], *cache])
    seconds = time.monotonic() - start
    flags = {
        "--prompt-tokens": _joined(workload.prompt_tokens),
        "--context": _joined(workload.contexts),
        "--tokens": str(workload.steps),
        "--repeats": str(workload.repeats),
        "--threads": str(task.threads),
    }
    command = (
        sys.executable,
        "-m",
        "runtime.bench",
        str(variant.artifact.folder),
        "--json",
        *(part for pair in flags.items() for part in pair),
    )
    return Contender(OURS, scheme, command, seconds), variant.job


def _graphs(job: Job) -> Path:
    from build.compile import exported_graphs

    return exported_graphs(job).path


def _rival(module: str, weights: Path, task: Task, *more: str) -> tuple[str, ...]:
    workload = msgspec.json.encode(task.workload).decode()
    return (sys.executable, "-m", f"build.bench.{module}", str(weights), workload, str(task.threads), *more)


def _installed_rivals(config: CompileConfig, task: Task) -> list[Contender]:
    """The rivals that read the checkpoint itself."""
    modules = {TRANSFORMERS: "rival_transformers", LLAMA: "rival_llama", GENAI: "rival_genai"}
    checkpoint = config.frontend.checkpoint
    is_gguf = checkpoint.suffix == ".gguf"
    reasons = {
        what: "it needs `make setup BENCH=1`"
        for what, module in INSTALLED.items()
        if importlib.util.find_spec(module) is None
    }
    if not is_gguf:
        reasons[LLAMA] = "it reads only GGUF checkpoints"
        if not (checkpoint / "config.json").is_file():
            reasons[TRANSFORMERS] = reasons[GENAI] = "it reads only Hugging Face and GGUF checkpoints"
    unsupported = [key for key in ("overrides", "adapter") if getattr(config.frontend, key)]
    if unsupported:
        reasons = dict.fromkeys(modules, f"it does not support frontend.{unsupported[0]}")
    for what, reason in reasons.items():
        console.print(f"{what} is left out: {reason}")
    return [
        Contender(what, scheme, _rival(module, checkpoint, task, scheme))
        for what, module in modules.items()
        if what not in reasons
        for scheme in RIVAL_SCHEMES[what]
    ]


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _windowed(config: CompileConfig) -> bool:
    """Whether the config forces a window on all layers, so that no context is too long."""
    return isinstance(config.frontend.overrides.get("sliding_window"), int)
