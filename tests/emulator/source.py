"""A CUDA source of TVM's as g++ takes it, each line in its place: what it writes in C++ stays as it is."""

import re
from pathlib import Path

KERNEL_HEADER = Path(__file__).parent / "kernel" / "cuda.h"
KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\((\d+)\) )?(\w+)\(([^)]*)\) *([{;])', re.MULTILINE
)
CUDA_HEADER = re.compile(r"^ *#include <(cuda\.h|cuda_fp16\.h|mma\.h)>", re.MULTILINE)
SHARED_ARRAY = re.compile(r"__shared__ alignas\((\d+)\) ([\w ]+?) (\w+)\[(\d+)\];")
DYNAMIC_SHARED_ARRAY = re.compile(r"extern __shared__ __align__\((\d+)\) ([\w ]+?) (\w+)\[\];")
ASSEMBLY = re.compile(r"(?:__asm__ __volatile__|asm volatile|asm)\(\s*((?:\"[^\"]*\"\s*)+):([^;]*)\);")
# An instruction between the setting of its predicate, from an operand, and the end of the predicate's scope.
PREDICATED = re.compile(
    r"\{ \.reg \.pred (?P<predicate>\w+); setp\.ne\.b32 (?P=predicate), (?P<operand>%\d+), 0; (?P<instruction>.*;) \}"
)
# An instruction that is repeated until its first operand, a predicate, is true.
WAIT_LOOP = re.compile(
    r"\{\s*\.reg \.pred\s+(?P<predicate>\w+);\s*(?P<label>\w+):\s*(?P<instruction>[\w.:]+) (?P=predicate),"
    r"(?P<operands>[^;]*);\s*@(?P=predicate)\s+bra\.uni (?P<done>\w+);\s*bra\.uni\s+(?P=label);\s*(?P=done):\s*\}"
)
# A register that TVM's function around a warpgroup's product takes by its value, although the product uses it later.
WARPGROUP_FACTOR = re.compile(r"uint32_t (__a\d)(?=, .*__b_desc)")
WARPGROUP_COLUMNS = re.compile(r"n(\d+)k16(?=\.f32\.f16\.f16$)")  # of a product whose sums are that many halves
# Bytes of shared memory that a launch may ask for: where several architectures run a source, or sm_90a alone.
SHARED_LIMITS = {False: 99 << 10, True: 227 << 10}
MAX_THREADS = 1024  # of a block, where a kernel has no launch bounds
# What would go unnoticed if it were left in a kernel.
NOT_EMULATED = ("asm", "__shared__")


def rewritten(source: str) -> str:
    """The source with the emulator's headers, and a table of its kernels at its end.

    Raises `ValueError` where something is not emulated.
    """
    text = CUDA_HEADER.sub("", source)
    text = KERNEL.sub(lambda match: match[0] + (" ENTER_KERNEL();" if match[4] == "{" else ""), text)
    text = SHARED_ARRAY.sub(r"SHARED_ARRAY(\2, \3, \4, \1);", text)
    text = DYNAMIC_SHARED_ARRAY.sub(r"DYNAMIC_SHARED_ARRAY(\2, \3, \1);", text)
    text = WARPGROUP_FACTOR.sub(r"const uint32_t& \1", text)
    text = ASSEMBLY.sub(_instruction, text)
    kernels = text[_first(KERNEL, text) :]  # in front of them are TVM's helpers, for other architectures too
    for word in NOT_EMULATED:
        if re.search(rf"\b{word}", kernels):
            raise ValueError(f"the source has a {word} that is not emulated")
    if not text.startswith("\n"):
        raise ValueError("the source does not begin with an empty line, where the emulator's header would go")
    return f'#include "{KERNEL_HEADER}"{text}{_table(source)}'


def _first(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    if match is None:
        raise ValueError("the source has no kernel")
    return match.start()


def _table(source: str) -> str:
    """The `KernelRow`s of all kernels, whose parameters must all be pointers."""
    limit = SHARED_LIMITS["wgmma" in source]
    rows = {name: _row(name, bound, parameters, limit) for bound, name, parameters, _ in KERNEL.findall(source)}
    return (
        'extern "C" __attribute__((visibility("default"))) KernelRow emulator_kernels[];\n'
        f"KernelRow emulator_kernels[] = {{\n{''.join(rows.values())}  {{nullptr, nullptr, 0, 0, 0}}}};\n"
    )


def _row(name: str, bound: str, parameters: str, shared_limit: int) -> str:
    types = [
        re.sub(r"\b(__restrict__|const)\b", "", p).strip().rpartition(" ")[0].strip() for p in parameters.split(",")
    ]
    if not all(kind.endswith("*") for kind in types):
        raise ValueError(f"{name} has parameters that are no pointers: {parameters}")
    arguments = ", ".join(f"static_cast<{kind}>(p[{i}])" for i, kind in enumerate(types))
    call = f'[](void **p) __attribute__((no_sanitize("thread"))) {{ {name}({arguments}); }}'
    return f'  {{"{name}", {call}, {len(types)}, {bound or MAX_THREADS}, {shared_limit}}},\n'


def _instruction(match: re.Match[str]) -> str:
    """A call of the instruction's function in `kernel/instructions.h`, on as many lines.

    `op.x {%0, %1}, [%2], 16;` becomes `ptx::op_x(__LINE__, first, second, third, 16);`. The sums of a warpgroup's
    product, whose number is in its name, become an array of their addresses, behind their number of columns.
    """
    text = "".join(re.findall(r'"([^"]*)"', match[1])).replace("\\n", " ")
    operands = _operands(match[2])
    text = PREDICATED.sub(lambda found: found["instruction"].replace(found["predicate"], found["operand"]), text)
    text = WAIT_LOOP.sub(lambda found: f"wait_until.{found['instruction']}{found['operands']}", text)
    name, arguments = re.fullmatch(r"\s*([\w.:]+)(.*?);?\s*", text, re.DOTALL).groups()
    words = [word for word in re.findall(r"[^\s,{}\[\]]+", arguments) if word != "_"]
    values = [operands[int(word[1:])] if word[1:].isdecimal() and word[0] == "%" else word.strip("%") for word in words]
    if columns := WARPGROUP_COLUMNS.search(name):
        name = name.replace(columns[0], "k16")
        sums = int(columns[1]) // 2
        values = [columns[1], f"{{{', '.join(f'&{value}' for value in values[:sums])}}}", *values[sums:]]
    function = re.sub(r"\W+", "_", name)
    return f"ptx::{function}({', '.join(['__LINE__', *values])});" + "\n" * match[0].count("\n")


def _operands(text: str) -> list[str]:
    """The expressions of an asm statement's operands: each is in parentheses behind its constraint, `"=f"(d[0])`."""
    found, at = [], 0
    while (start := text.find("(", at)) >= 0:
        depth, at = 1, start + 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        found.append(text[start:at])
    return found
