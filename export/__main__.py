"""Write the ONNX graphs of a config into its workspace.

`python -m export yaml/x.yaml [--set key.path=value ...] [--dump DIR]`
"""

from export.configuration.config import stage_parser
from export.console import console
from export.job import Job
from export.peak_memory import collect_rarely, return_freed_blocks
from export.pipeline import export_model
from runtime.errors import run_command


def main() -> int:
    """Run the stage and return the exit status."""
    arguments = stage_parser("Export a checkpoint to static ONNX graphs.").parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    return_freed_blocks()
    collect_rarely()
    graphs = export_model(job)
    if arguments.dump is not None:
        graphs.dump(arguments.dump)
    console.print(f"graphs: {graphs.path}")
    return 0


if __name__ == "__main__":
    run_command(main)
