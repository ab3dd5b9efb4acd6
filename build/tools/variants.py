"""Variants of one config that are compiled side by side, each from its own config file in the workspace."""

from collections.abc import Sequence
from dataclasses import dataclass

from build.compile import compile_job
from export.configuration.config import describe_defaults
from export.job import Job
from runtime.artifact.folder import Artifact
from runtime.artifact.schemes import SCHEMES

BASELINE = "fp32"
INT4 = ("quantize.symmetric=true", "quantize.group_size=32", "backend.dtype=fp32")
# Ways to store weights and caches, by label, and what is set for each, whatever the config says.
VARIANTS: dict[str, list[str]] = {
    label: ["quantize.cache=auto", *sets, "quantize.keep=[]"]
    for label, sets in {
        BASELINE: ["quantize.scheme=none", "backend.dtype=fp32"],
        "source": ["quantize.scheme=source", "backend.dtype=fp32"],
        "source_dynamic": ["quantize.scheme=source_dynamic", "backend.dtype=fp32"],
        "bf16": ["quantize.scheme=none", "backend.dtype=bf16"],
        "bf16_dot": ["quantize.scheme=bf16_dot", "backend.dtype=bf16"],
        "fp16": ["quantize.scheme=none", "backend.dtype=fp16"],
        "fp8-cache": ["quantize.scheme=none", "backend.dtype=fp32", "quantize.cache=fp8"],
        "int8-cache": ["quantize.scheme=none", "backend.dtype=fp32", "quantize.cache=int8"],
        "int4-cache": ["quantize.scheme=none", "backend.dtype=fp32", "quantize.cache=int4"],
        "fp8": ["quantize.scheme=fp8", "backend.dtype=fp32"],
        "int8": ["quantize.scheme=int8", "backend.dtype=fp32"],
        "int8_dynamic": ["quantize.scheme=int8_dynamic", "backend.dtype=fp32"],
        "int4": [*INT4, "quantize.scheme=int4", "quantize.method=weighted_search"],
        "int4-search": [*INT4, "quantize.scheme=int4", "quantize.method=search"],
        "int4-gptq": [*INT4, "quantize.scheme=int4", "quantize.method=gptq"],
        "int4-zero-points": [
            "quantize.scheme=int4",
            "quantize.method=weighted_search",
            "quantize.symmetric=false",
            "quantize.group_size=32",
            "backend.dtype=fp32",
        ],
        "int4_dynamic": [*INT4, "quantize.scheme=int4_dynamic", "quantize.method=weighted_search"],
    }.items()
}


@dataclass(frozen=True)
class Variant:
    """One compiled variant: its job, with the config file that was written for it, and its artifact."""

    job: Job
    artifact: Artifact


def fitting_variants(job: Job, *, is_quantized: bool) -> list[str]:
    """The labels of all variants, but for those that carry quantized matrices if the checkpoint has none.

    Those would only repeat the baseline.
    """
    schemes = {label: SCHEMES[job.changed(sets).config.quantize.scheme] for label, sets in VARIANTS.items()}
    return [label for label, scheme in schemes.items() if is_quantized or not scheme.carries]


def compile_variant(job: Job, label: str, changes: Sequence[str]) -> Variant:
    """Compile a job's config with `changes` (as `--set` takes them) into out/NAME-LABEL/."""
    config = job.changed(changes).config
    folder = config.workspace.path / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job.artifact.name}-{label}.yaml"
    path.write_text("\n".join(describe_defaults(config)) + "\n")
    variant = Job.load(path)
    return Variant(variant, compile_job(variant))
