"""`python -m export yaml/x.yaml [--set key.path=value ...] [--dump DIR]`: write the ONNX graphs of a config into its workspace."""

from pathlib import Path

from export.configuration.config import artifact_dir, load_config, stage_parser
from export.console import console
from export.memory import note_peak, return_freed_blocks
from export.onnx_graphs.graphs import OnnxGraphs
from export.plan import export_key, open_configured, workspace_of
from export.stage import locked, run_stage, stage_folder
from runtime.errors import run_command


def main() -> int:
    """Run the stage; returns the exit status."""
    arguments = stage_parser("Export a checkpoint to static ONNX graphs.").parse_args()
    config = load_config(arguments.config, arguments.overrides)
    return_freed_blocks()
    key = export_key(config)
    workspace = workspace_of(config, artifact_dir(arguments.config))
    with locked(workspace / "export", console.print):
        folder = stage_folder(workspace, "graphs", key)
        if not folder.is_dir():
            from export.pipeline import export_model  # loads torch, which a finished stage does not need

            checkpoint = open_configured(config)
            for note in checkpoint.notes:
                console.print(f"warning: {note}", style="yellow")

            def fill(fresh: Path) -> None:
                export_model(config, checkpoint, fresh)
                note_peak(fresh)

            run_stage(workspace, "graphs", key, fill)
        if arguments.dump is not None:
            OnnxGraphs.open(folder).dump(arguments.dump)
        console.print(f"graphs: {folder}")
    return 0


if __name__ == "__main__":
    run_command(main)
