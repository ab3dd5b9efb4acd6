"""Allowed imports, read from the source and tried in fresh processes."""

import ast
import json
import subprocess
import sys
from functools import cache

import pytest

from export.stage import ROOT, our_modules

PACKAGES = ("runtime", "export", "build", "cluster")
PACKAGE_NAMES = set(PACKAGES)
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "tvm", "gguf", "pydantic", "rich"}
# Runtime modules that the export stage may use: the contract types, the errors and the tensor format ...
SHARED = {
    "runtime.artifact.caches",
    "runtime.artifact.durable",
    "runtime.artifact.consistency",
    "runtime.artifact.layouts",
    "runtime.artifact.manifest",
    "runtime.artifact.rotary",
    "runtime.artifact.schemes",
    "runtime.artifact.signatures",
    "runtime.artifact.targets",
    "runtime.errors",
    "runtime.process_memory",
    "runtime.artifact.tensor_file",
    "runtime.artifact.hashing",
}
# ... and those that a compile needs besides: it writes an artifact, opens it as the box will, and finds the same
# libraries. (Other commands of build run the engine.)
COMPILE_SHARED = SHARED | {
    "runtime.artifact.folder",
    "runtime.artifact.cpu",
    "runtime.artifact.replacing",
    "runtime.engines.cpu_level",
    "runtime.engines.tvm_runtime",
    "runtime.engines.cuda_driver",
}


@cache
def modules(package):
    """Module names of a package, with their files."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / package).rglob("*.py"))
    }


@cache
def imported(path):
    """Names that a file imports anywhere, also inside functions: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def ours(names, package):
    """Those of `names` that are modules of one of our packages."""
    known = modules(package)
    return {name for name in names if name in known}


def test_there_is_something_to_check():
    assert all(len(modules(package)) > 5 for package in PACKAGES)


# run by another Python on the machine, one that has torch; no module imports them
SCRIPTS = {"runtime.gpu_check.torch_script", "runtime.gpu_check.transformers_script"}


@pytest.mark.parametrize("module", sorted(set(modules("runtime")) - SCRIPTS))
def test_runtime_imports_no_stage_and_no_compiler(module):
    """`tvm` would be the compiler; the runtime finds its library without importing it."""
    roots = {name.partition(".")[0] for name in imported(modules("runtime")[module])}
    assert not roots & (HEAVY | {"export", "build", "cluster", "tests"})
    assert not ours(imported(modules("runtime")[module]), "runtime") & SCRIPTS


@pytest.mark.parametrize("module", modules("export"))
def test_export_uses_only_the_contract_of_the_runtime(module):
    names = imported(modules("export")[module])
    assert not ours(names, "build")
    assert ours(names, "runtime") <= SHARED | {"runtime.artifact.bounds", "runtime.artifact.golden"}
    assert "tvm" not in {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("module", modules("cluster"))
def test_a_node_of_a_cluster_needs_the_box_and_no_stage(module):
    """What is measured and drawn runs on the compile host."""
    names = imported(modules("cluster")[module])
    roots = {name.partition(".")[0] for name in names}
    if not module.startswith("cluster.bench."):
        assert not roots & ((HEAVY | {"export", "build", "tests"}) - {"rich"})


@pytest.mark.parametrize("package", ["export", "build"])
def test_stages_know_of_no_cluster(package):
    for path in modules(package).values():
        assert "cluster" not in {name.partition(".")[0] for name in imported(path)}


# processes in which nothing of ours runs beside torch
RIVAL_PROCESSES = {"build.bench.rival_transformers", "build.bench.from_gguf"}


@pytest.mark.parametrize("module", sorted(set(modules("build")) - RIVAL_PROCESSES))
def test_build_uses_of_export_only_what_loads_no_torch(module):
    names = imported(modules("build")[module])
    assert "torch" not in {name.partition(".")[0] for name in names}
    for name in ours(names, "export"):
        for reached, path in our_modules(name).items():
            assert not {n.partition(".")[0] for n in top_level(path)} & {"torch", "transformers", "onnxscript"}, (
                f"{name} reaches {reached}"
            )


@cache
def top_level(path):
    """Names that a file imports as soon as it is itself imported."""
    tree = ast.parse(path.read_text())
    return {name for node in tree.body for name in _names(node)}


def _names(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


# The rooms of each package, each with the rooms of its own package that it may import. A package's top may import them
# all; rooms may import from the top only as listed below. So there are no cycles.
ROOMS = {
    "export.checkpoints": set(),
    "export.static_model": set(),
    "export.calibration": {"export.checkpoints", "export.static_model", "export.weights"},
    "export.weights": {"export.checkpoints"},
    "export.configuration": {"export.weights"},
    "export.onnx_graphs": {"export.static_model", "export.weights"},
    "export.conversion": {"export.checkpoints"},
    "export.proof": {
        "export.checkpoints",
        "export.conversion",
        "export.onnx_graphs",
        "export.static_model",
        "export.weights",
    },
    "build.kernels": set(),
    "build.packing": set(),
    "build.rules": {"build.kernels"},
    "build.tvm_stage": {"build.kernels", "build.packing", "build.rules"},
    "build.shipping": set(),
    "build.tools": {"build.packing"},
    "build.bench": {"build.kernels", "build.packing", "build.tools", "build.tvm_stage"},
    "cluster.store": set(),
    "cluster.serving": {"cluster.store"},
    "cluster.bench": {"cluster.serving"},
    "runtime.artifact": set(),
    "runtime.text": {"runtime.artifact"},
    "runtime.decoding": {"runtime.artifact", "runtime.text"},
    "runtime.engines": {"runtime.artifact", "runtime.decoding"},
    "runtime.scheduling": {"runtime.decoding", "runtime.engines", "runtime.text"},
    "runtime.benchmarks": {
        "runtime.artifact",
        "runtime.decoding",
        "runtime.engines",
        "runtime.scheduling",
        "runtime.text",
    },
    "runtime.gpu_check": {"runtime.artifact", "runtime.benchmarks", "runtime.engines"},
    "runtime.server": {
        "runtime.artifact",
        "runtime.decoding",
        "runtime.engines",
        "runtime.scheduling",
        "runtime.text",
    },
}
# Modules at a package's top that rooms build on: errors, text tables, progress, stages on disk, and TVM; and, for rooms
# that ship, compare and measure whole artifacts, the compile itself.
BASES = {
    "runtime.errors",
    "runtime.columns",
    "runtime.process_memory",
    "runtime.progress",
    "runtime.small_files",
    "export.console",
    "export.workspace",
    "export.stage",
    "export.tokenizer_process",
    "build.compiler",
    "cluster.local",
}
WHOLE = {"build.shipping", "build.tools", "build.bench"}
USED_BY_WHOLE = {"build.compile", "runtime.bench", "runtime.cli", "runtime.doctor", "runtime.verify"}


def room_of(module):
    """`a.b` for `a.b.c`; None for a module at a package's top."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else None


def test_every_room_is_told():
    assert {room_of(module) for package in PACKAGES for module in modules(package)} - {None} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    package = room.partition(".")[0]
    of_package = modules(package)
    for module, path in of_package.items():
        if room_of(module) != room:
            continue
        for name in ours(imported(path), package):
            if room_of(name) is not None:
                assert room_of(name) in {room, *ROOMS[room]}, f"{module} imports {name}"
            else:
                allowed = BASES | (
                    USED_BY_WHOLE if room in WHOLE | {"runtime.decoding", "runtime.gpu_check"} else set()
                )
                assert name in allowed | PACKAGE_NAMES, f"{module} imports {name}"


def test_rooms_make_no_circle():
    """Repeatedly removing the rooms that import none of the remaining ones removes them all."""
    left = dict(ROOMS)
    while left:
        free = [room for room, below in left.items() if not below & set(left)]
        assert free, f"{sorted(left)} import each other"
        for room in free:
            del left[room]


def test_a_compile_uses_only_what_it_needs_of_the_runtime():
    for module, path in our_modules("build.compile").items():
        if not module.startswith("runtime."):
            assert ours(imported(path), "runtime") <= COMPILE_SHARED, module


def loaded_after(statement):
    """Root names in sys.modules of a fresh process after one statement."""
    code = (
        f"import json, sys; {statement}; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules if sys.modules[name]})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(result.stdout))


@pytest.mark.parametrize(
    "module",
    ["runtime.engines.engine", "runtime.generate", "runtime.artifact.folder", "runtime.chat", "runtime.verify"],
)
def test_the_runtime_loads_no_stage_and_no_compiler(module):
    loaded = loaded_after(f"import {module}")
    assert module.partition(".")[0] in loaded
    assert not loaded & (HEAVY | {"export", "build"})


def test_starting_an_engine_loads_no_compiler_and_no_torch():
    """This holds for the TVM runtime itself, not only for our modules."""
    loaded = loaded_after("from runtime.engines.tvm_runtime import load_runtime; load_runtime(1)")
    assert "tvm_ffi" in loaded
    assert not loaded & (HEAVY | {"export", "build"})


@pytest.mark.parametrize(
    "module",
    [
        "build.compile",
        "build.pipeline",
        "build.tools.plan",
        "build.tvm_stage.level_libraries",
        "export.results",
        "export.configuration.config",
        "export.checkpoints.checkpoint",
    ],
)
def test_the_build_stage_loads_no_torch(module):
    assert not loaded_after(f"import {module}") & {"torch", "transformers", "onnxscript", "onnxruntime"}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing(package):
    """Each __init__.py is only a docstring."""
    (docstring,) = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert isinstance(docstring.value, ast.Constant)


def test_yaml_holds_only_configs():
    """An __init__.py there would hide PyYAML."""
    import yaml

    assert {path.suffix for path in (ROOT / "yaml").iterdir()} == {".yaml"}
    assert hasattr(yaml, "safe_load")


def test_no_module_is_named_after_a_library():
    names = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not names & {"torch", "onnx", "onnxruntime", "tvm", "tokenizers", "transformers", "numpy", "yaml", "gguf"}
