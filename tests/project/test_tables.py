"""The abilities of a target or a format are stated in its row: no other code compares names to find them out."""

import ast

import pytest

from export.stage import ROOT
from export.weights.table import FORMATS
from runtime.artifact.schemes import SCHEMES
from runtime.artifact.targets import TARGETS

# Dtypes of tensors are compared where tensors are handled; the other names belong to a target, a format or a scheme.
DTYPES = {"float32", "float16", "bfloat16", "int8"}
NAMES = {*TARGETS, *FORMATS, *SCHEMES} - DTYPES - {"none"}
# Run by a Python on the box that has torch, whose devices have the same name as our target.
SCRIPTS = {"runtime/gpu_check/torch_script.py", "runtime/gpu_check/transformers_script.py"}
MODULES = [
    path.relative_to(ROOT).as_posix()
    for package in ("export", "build", "runtime")
    for path in (ROOT / package).rglob("*.py")
]


def names_compared(tree):
    """Constants in comparisons, and in the text methods that test how a name begins or ends."""
    for node in ast.walk(tree):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("startswith", "endswith"):
            sides = node.args
        for side in sides:
            yield from (part.value for part in ast.walk(side) if isinstance(part, ast.Constant))


def test_comparisons_are_seen():
    tree = ast.parse("a == 'cuda'\nb in ('x', 'int4')\nc.endswith('_dynamic')")
    assert list(names_compared(tree)) == ["cuda", "x", "int4", "_dynamic"]


@pytest.mark.parametrize("module", sorted(set(MODULES) - SCRIPTS))
def test_no_module_compares_names_of_targets_and_formats(module):
    found = set(names_compared(ast.parse((ROOT / module).read_text())))
    assert not found & (NAMES | {"_dynamic", "int"})
