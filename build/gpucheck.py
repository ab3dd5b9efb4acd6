"""`python -m build.gpucheck yaml/fp16.yaml`: write one file for a GPU box, out/gpucheck.tar.zst.

The file checks and times the kernels of known models:

    gpucheck/install.sh, requirements.txt, wheels/, runtime/   as in `build.shipping.ship`
    gpucheck/checks/SHAPE-SCHEME/                              a manifest and a library, compiled from a model's sizes
                                                               without its weights

On the box: `./install.sh`, then `.venv/bin/python -m runtime.gpucheck checks/*`, which makes random weights there.
A check may also have the matrices of a quantized checkpoint (`ENCODINGS`) in place of a scheme. The config gives the
architectures, the prefill chunks, the caches and the dtype; its checkpoint is not read.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from build.pipeline import artifact_key, build_library, library_key, manifest_of
from build.shipping.archive import Member, with_sums, write_archive
from build.shipping.ship import add_box_options, pythons_of, summary, system_members, with_bill
from build.shipping.wheels import box_packages, fetch_wheels
from build.tools.random_checkpoint import SHAPES, headers
from build.tvm_stage.cuda import spilling
from build.tvm_stage.target import target_spec
from export.checkpoints.checkpoint import Checkpoint
from export.checkpoints.encodings.encoding import Encoding
from export.configuration.config import CompileConfig, config_parser
from export.console import console, output
from export.job import Job, launch
from export.onnx_graphs.graphs import OnnxGraphs, record_path
from export.results import TRACING_TOOLS, export_record
from export.stage import stage_key
from export.workspace import CONTENTS_FILE, locked, run_stage
from runtime.artifact.consistency import LIBRARY_FILE, MANIFEST_FILE
from runtime.artifact.folder import read_manifest
from runtime.artifact.hashing import file_entry
from runtime.artifact.manifest import to_json
from runtime.artifact.targets import TARGETS
from runtime.errors import UserError, run_command

NAME = "gpucheck"
# What quantized checkpoints store, by a short name.
ENCODINGS: Mapping[str, Encoding] = {
    "q4_1": Encoding("int4", 32, "float16", "minimums"),
    "q6_k": Encoding("int8", 16, "float32"),
    "gptq": Encoding("int4", 128, "float16", "zero_points", order="by activations"),
    "fp8_blocks": Encoding("float8", 128, "float32"),
}
CHECKS = (
    "7b:none",
    "7b:int8",
    "7b:int4",
    *(f"7b/2:{name}" for name in ENCODINGS),
    "mixtral-8x7b/2:none",
    "tiny:none",
)


@dataclass(frozen=True)
class CheckSpec:
    """A model's sizes, the number of its layers, and how its weights are stored."""

    shape: str
    layers: int | None
    scheme: str  # of `quantize.scheme`, or a row of `ENCODINGS`

    @classmethod
    def parse(cls, text: str) -> "CheckSpec":
        """Parse text such as "7b:int8" or "mixtral-8x7b/2:none"; raises `UserError`."""
        model, _, scheme = text.partition(":")
        shape, _, layers = model.partition("/")
        if shape not in SHAPES or not scheme or (layers and not (layers.isdecimal() and int(layers) > 0)):
            raise UserError(
                f"{text!r} is not a check, expected SHAPE:SCHEME or SHAPE/LAYERS:SCHEME "
                f"with a shape of {', '.join(SHAPES)}"
            )
        return cls(shape, int(layers) if layers else None, scheme)

    def checkpoint(self, overrides: Mapping[str, object]) -> Checkpoint:
        """What stands for the model's checkpoint."""
        return headers(self.shape, overrides, self.layers, ENCODINGS.get(self.scheme))

    @property
    def settings(self) -> list[str]:
        """Changes to a config."""
        return [f"name={self.name}", f"quantize.scheme={'source' if self.scheme in ENCODINGS else self.scheme}"]

    @property
    def name(self) -> str:
        """Name of the check's folder."""
        depth = f"-{self.layers}-layers" if self.layers else ""
        return f"{self.shape}{depth}-{'fp16' if self.scheme == 'none' else self.scheme}"


def main() -> int:
    """Compile the checks and write the file; returns the exit status."""
    parser = config_parser("Put kernels of known models, the runtime and its packages into one file that checks a GPU.")
    parser.add_argument(
        "--checks",
        default=" ".join(CHECKS),
        metavar="'7b:int8 ...'",
        help="checks to compile, each as SHAPE[/LAYERS]:SCHEME, where a scheme is one of quantize.scheme or "
        f"one of {', '.join(ENCODINGS)}, as checkpoints store weights (default: %(default)s)",
    )
    add_box_options(parser)
    arguments = parser.parse_args()
    pythons = pythons_of(arguments)
    checks = [CheckSpec.parse(text) for text in arguments.checks.split()]
    job = Job.load(arguments.config, arguments.overrides)
    configs = [check_config(job, check) for check in checks]
    workspace = configs[0].workspace.path / NAME
    target = job.artifact.with_name(f"{NAME}.tar.zst")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(workspace, console.print):  # to the end, so that no other run replaces what goes into the archive
        folders = [compiled_check(config, check, workspace) for config, check in zip(configs, checks, strict=True)]
        wheels = fetch_wheels(box_packages(read_manifest(folders[0])), pythons, configs[0].workspace.path / "wheels")
        checked = system_members(configs[0].backend.target, wheels, pythons, gpu_check=True)
        for folder, check in zip(folders, checks, strict=True):
            files = [path for path in folder.iterdir() if path.name != CONTENTS_FILE]
            checked |= {f"checks/{check.name}/{path.name}": Member(path, "libraries") for path in files}
        members = with_sums(with_bill(checked, NAME, None), None)
        write_archive(members, NAME, target)
    output.print(summary(members, target, wheels, pythons))
    output.print(
        f"on the box:  tar --zstd -xf {target.name} && cd {NAME} && ./install.sh && "
        ".venv/bin/python -m runtime.gpucheck checks/*"
    )
    return 0


def check_config(job: Job, check: CheckSpec) -> CompileConfig:
    """The config of one check; raises `UserError` unless it is for CUDA."""
    config = job.changed(check.settings).config
    if not TARGETS[config.backend.target].on_device:
        raise UserError(
            f"{job.path} has backend.target {config.backend.target}, expected cuda: a GPU check runs CUDA kernels"
        )
    return config


def compiled_check(config: CompileConfig, check: CheckSpec, workspace: Path) -> Path:
    """The folder of one check, made again unless the existing one has the same inputs, code and tools."""
    record = export_record(config, check.checkpoint(config.frontend.overrides))
    spec = target_spec(config.backend)
    inputs = {
        "record": msgspec.to_builtins(record),
        "target": msgspec.to_builtins(spec),
        "tracer": stage_key({}, "export.onnx_graphs.tracing", TRACING_TOOLS),
    }
    key = stage_key(inputs, "build.tvm_stage.library", ("apache-tvm", "apache-tvm-ffi"))
    return run_stage(workspace, check.name, key, partial(_compile, to_json(record), config))


def _compile(record: bytes, config: CompileConfig, folder: Path) -> None:
    """Trace and compile, and keep only the library and its manifest."""
    with TemporaryDirectory(prefix="parts-", dir=folder) as temporary:
        parts = Path(temporary)
        path = record_path(parts, "check")
        path.write_bytes(record)
        launch("export.trace", str(path))
        graphs, spec = OnnxGraphs.open(path), target_spec(config.backend)
        build_library(graphs, spec, parts, dump=None)
        shutil.copyfile(parts / LIBRARY_FILE, folder / LIBRARY_FILE)
        manifest = manifest_of(
            config.name,
            graphs.record,
            spec,
            parts,
            artifact_key(config.name, library_key(graphs.key, spec)),
            (file_entry(folder / LIBRARY_FILE),),
        )
        for note in spilling(manifest.kernels):
            console.print(f"warning: {note}", style="yellow")
        (folder / MANIFEST_FILE).write_bytes(to_json(manifest))


if __name__ == "__main__":
    run_command(main)
