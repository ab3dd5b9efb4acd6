"""`python -m build yaml/x.yaml [--set key.path=value ...] [--dump DIR]`: compile a config into its artifact.

Runs export first if its results are stale.
"""

import time

from build.compile import compile_job
from build.tools.footprint import Footprint, caches_of, description, table
from export.configuration.config import describe_defaults, stage_parser
from export.console import console, output
from export.job import Job
from export.peak_memory import collect_rarely, noted_peak, return_freed_blocks
from export.results import weights_folder
from runtime.artifact.consistency import MANIFEST_FILE
from runtime.artifact.folder import Artifact
from runtime.errors import run_command
from runtime.process_memory import peak_memory


def main() -> int:
    """Compile the config; returns the exit status."""
    arguments = stage_parser("Compile a checkpoint into an artifact.").parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    console.print("\n".join(describe_defaults(job.config)), style="dim", markup=False)
    return_freed_blocks()
    collect_rarely()
    start = time.time()
    artifact = compile_job(job, arguments.dump)
    made = (artifact.folder / MANIFEST_FILE).stat().st_mtime >= start
    footprint = measured(job, artifact, made=made)
    m = artifact.manifest
    output.print(
        table(f"{artifact.folder}: {description(m.name, m.model, m.target, m.quantization)}", footprint.rows(), {})
    )
    output.print(
        f"{'compiled' if made else 'up to date'}, {time.time() - start:,.1f} s; "
        f"to measure memory on the box: python -m runtime.bench {artifact.folder}"
    )
    return 0


def measured(job: Job, artifact: Artifact, *, made: bool) -> Footprint:
    """Measure the footprint of the compile; the build's peak is known only if this process `made` the artifact."""
    manifest = artifact.manifest
    return Footprint(
        files={path.name: path.stat().st_size for path in artifact.folder.iterdir()},
        caches=caches_of(manifest.model, manifest.shape, manifest.caches),
        target=manifest.target,
        box_peak=None,
        export_peak=noted_peak(weights_folder(job)),
        build_peak=peak_memory() if made else None,
        workspace=sum(path.stat().st_size for path in job.workspace.rglob("*") if path.is_file()),
    )


if __name__ == "__main__":
    run_command(main)
