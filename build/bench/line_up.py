"""The line-up of the bench: who takes part, with the config's model and with a large one of random weights."""

import importlib.util
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from build.bench.contenders import (
    GENAI,
    LLAMA,
    ONNXRUNTIME,
    RIVAL_SCHEMES,
    SCHEMES,
    TRANSFORMERS,
    Contender,
    Task,
    compiled,
    flops_per_token,
    is_quantized,
    rival_command,
)
from build.tools.llama_files import AS_IT_IS
from build.tools.random_checkpoint import SHAPES, write_random_checkpoint
from build.tools.random_gguf import write_random_gguf
from export.configuration.config import CompileConfig
from export.console import console
from export.job import Job
from export.workspace import made_whole

INSTALLED = {LLAMA: "llama_cpp", GENAI: "onnxruntime_genai"}  # modules that `make setup BENCH=1` installs
MODULES = {TRANSFORMERS: "rival_transformers", LLAMA: "rival_llama", GENAI: "rival_genai"}
LARGE = "1.1b"  # a shape whose weights are far larger than any processor's cache
LARGE_LABEL = LARGE.upper()
LARGE_SCHEMES = ("fp32", "bf16", "bf16_dot", "int8", "int8_dynamic", "int4_dynamic")
GGUF_FILE = f"random-{LARGE}.gguf"
CHECKPOINT_FOLDER = "checkpoint"
NOT_INSTALLED = "it needs `make setup BENCH=1`"


def known_names() -> set[str]:
    """Every name by which a contender can be asked for."""
    rivals = {f"{what} {scheme}" for what, schemes in RIVAL_SCHEMES.items() for scheme in schemes}
    large = {*LARGE_SCHEMES, *(f"{LLAMA} {scheme}" for scheme in _large_rivals())}
    return {*SCHEMES, *rivals, *(f"{LARGE_LABEL} {name}" for name in large)}


def contenders(job: Job, task: Task, *, large: bool, only: Collection[str] | None = None) -> list[Contender]:
    """Compile the schemes, and list them with their rivals; with `only`, those of these names (see `Contender.name`).

    Without `only`, a random model of 1.1 B parameters takes part as well if `large` is set, at the shortest context.
    """
    names = known_names() if only is None else only
    asked_large = {name.removeprefix(f"{LARGE_LABEL} ") for name in names if name.startswith(f"{LARGE_LABEL} ")}
    found = _own_model(job, task, names)
    if asked_large and (large or only is not None):
        short = replace(task, workload=replace(task.workload, contexts=task.workload.contexts[:1]))
        found += _large_model(job, short, asked_large)
    return found


def _own_model(job: Job, task: Task, names: Collection[str]) -> list[Contender]:
    from build.tools.variants import fitting_variants  # loads TVM's compiler, which the workers must not

    ours, theirs, operations = [], [], flops_per_token(job.config)
    fitting = fitting_variants(job, is_quantized=is_quantized(job.config))
    graphs_of = RIVAL_SCHEMES[ONNXRUNTIME]
    for scheme, own in SCHEMES.items():
        runs_graphs = scheme in graphs_of and f"{ONNXRUNTIME} {scheme}" in names
        if own.variant not in fitting or not (scheme in names or runs_graphs):
            continue
        entries, variant = compiled(job, scheme, task, operations)
        ours += entries if scheme in names else []
        if runs_graphs:
            theirs.append(Contender(ONNXRUNTIME, scheme, rival_command("rival_onnxruntime", _graphs(variant), task)))
    reasons = _reasons_to_leave_out(job.config)
    for what, reason in reasons.items():
        console.print(f"{what} is left out: {reason}")
    checkpoint = job.config.frontend.checkpoint
    theirs += [
        Contender(what, scheme, rival_command(module, checkpoint, task, scheme))
        for what, module in MODULES.items()
        if what not in reasons
        for scheme in RIVAL_SCHEMES[what]
        if f"{what} {scheme}" in names
    ]
    return [*ours, *theirs]


def _large_model(job: Job, task: Task, names: Collection[str]) -> list[Contender]:
    """The contenders with a random model of the shape `LARGE`, whose files are written now if they do not exist."""
    workspace = job.config.workspace.path
    n_layers = int(SHAPES[LARGE]["num_hidden_layers"])
    checkpoint = _large_checkpoint(workspace, n_layers)
    changes = {
        "name": f"random-{LARGE}",
        "frontend.checkpoint": checkpoint,
        "frontend.type": "huggingface",
        "frontend.head": "auto",
        "frontend.instruct": "false",
        "frontend.overrides": "{}",
        "frontend.adapter": "null",
        "frontend.chat_template": "null",
    }
    large = job.changed([f"{key}={value}" for key, value in changes.items()])
    found, operations = [], flops_per_token(large.config)
    for scheme in LARGE_SCHEMES:
        if scheme in names:
            found += compiled(large, scheme, task, operations, LARGE_LABEL)[0]
    types = [scheme for scheme in _large_rivals() if f"{LLAMA} {scheme}" in names]
    if types and importlib.util.find_spec(INSTALLED[LLAMA]) is None:
        console.print(f"{LLAMA} is left out: {NOT_INSTALLED}")
    elif types:
        folder = made_whole(
            workspace / f"random-{LARGE}-gguf", lambda folder: write_random_gguf(folder / GGUF_FILE, LARGE, n_layers)
        )
        path, module = folder / GGUF_FILE, MODULES[LLAMA]
        found += [
            Contender(LLAMA, scheme, rival_command(module, path, task, scheme), model=LARGE_LABEL) for scheme in types
        ]
    return found


def _large_checkpoint(workspace: Path, n_layers: int) -> Path:
    """A folder of its own within what is made whole, since a checkpoint is written to an empty folder alone."""
    made = made_whole(
        workspace / f"random-{LARGE}",
        lambda folder: write_random_checkpoint(folder / CHECKPOINT_FOLDER, LARGE, n_layers),
    )
    return made / CHECKPOINT_FOLDER


def _large_rivals() -> list[str]:
    return [scheme for scheme in RIVAL_SCHEMES[LLAMA] if scheme != AS_IT_IS]


def _graphs(job: Job) -> Path:
    from build.compile import exported_graphs

    return exported_graphs(job).path


def _reasons_to_leave_out(config: CompileConfig) -> dict[str, str]:
    """Why some rivals that read the checkpoint itself cannot take part, by rival."""
    unsupported = [key for key in ("overrides", "adapter") if getattr(config.frontend, key)]
    if unsupported:
        return dict.fromkeys(MODULES, f"it does not support frontend.{unsupported[0]}")
    checkpoint = config.frontend.checkpoint
    reasons = {what: NOT_INSTALLED for what, module in INSTALLED.items() if importlib.util.find_spec(module) is None}
    if checkpoint.suffix != ".gguf":
        reasons[LLAMA] = "it reads only GGUF checkpoints"
        if not (checkpoint / "config.json").is_file():
            reasons[TRANSFORMERS] = reasons[GENAI] = "it reads only Hugging Face and GGUF checkpoints"
    return reasons
