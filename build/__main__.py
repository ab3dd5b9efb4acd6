"""`python -m build yaml/x.yaml [--set key.path=value ...] [--dump DIR]`: compile a config into its artifact, running export first if it is stale."""

import time

from rich.table import Table

from build.compile import compile_config
from export.config import describe_defaults, load_config, stage_parser
from export.console import console, output, peak_memory_mb
from runtime.artifact import Artifact
from runtime.errors import run_command


def main() -> int:
    """Compile; returns the exit status."""
    arguments = stage_parser("Compile a checkpoint into an artifact.").parse_args()
    config = load_config(arguments.config, arguments.overrides)
    console.print("\n".join(describe_defaults(config)), style="dim", markup=False)
    start = time.perf_counter()
    artifact = compile_config(config, arguments.config, arguments.overrides, arguments.dump)
    output.print(summary(artifact, time.perf_counter() - start))
    return 0


def summary(artifact: Artifact, seconds: float) -> Table:
    """What was made: sizes, shapes, time and memory."""
    manifest = artifact.manifest
    sizes = {entry.path: entry.size for entry in manifest.files}
    table = Table(title=str(artifact.folder), title_justify="left", show_header=False)
    table.add_row("model", f"{manifest.name}: {manifest.model.n_layers} layers of dim {manifest.model.dim}, vocabulary {manifest.model.vocab_size}")
    table.add_row("target", " ".join([manifest.target.kind, manifest.target.cpu, *manifest.target.arch]))
    table.add_row("storage", f"scheme {manifest.scheme}, dtype {manifest.target.dtype}")
    table.add_row("graphs", ", ".join(graph.name for graph in manifest.graphs))
    table.add_row("caches", f"{cache_bytes(artifact) / 1e6:,.1f} MB")
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
        table.add_row(path, f"{size / 1e6:,.2f} MB")
    table.add_row("time", f"{seconds:,.1f} s")
    table.add_row("peak memory", f"{peak_memory_mb():,.0f} MB")
    return table


def cache_bytes(artifact: Artifact) -> int:
    """Bytes of all key and value caches."""
    itemsize = {"fp32": 4, "fp16": 2, "bf16": 2}[artifact.manifest.target.dtype]
    m, shape = artifact.manifest.model, artifact.manifest.shape
    return 2 * itemsize * shape.batch * m.n_kv_heads * m.head_dim * sum(m.cache_lens(shape.cache_len))


if __name__ == "__main__":
    run_command(main)
