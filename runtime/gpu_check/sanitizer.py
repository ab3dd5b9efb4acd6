"""NVIDIA's compute-sanitizer on the kernels of a folder, where it is installed: one run for each of its tools."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob

from runtime.gpu_check.measurement import finding_of
from runtime.gpu_check.process_group import UnfinishedError, run_group

COMMAND = "compute-sanitizer"
PLACES = f"/usr/local/cuda*/bin/{COMMAND}"  # where a toolkit has it that PATH does not name
# accesses outside of memory; races of shared memory; wrong barriers; reads of memory that nobody wrote
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LONGEST = 150  # seconds in which a tool says something, at least its summary
OUTPUT = "========="  # begins each line of compute-sanitizer
SUMMARY = re.compile(rf"{OUTPUT} \w+ SUMMARY: ((\d+) .*)")
UNSUPPORTED = "Device not supported"  # as in some containers
LINES = 60  # of the output that are kept if something was found


@dataclass(frozen=True)
class SanitizerResult:
    """What a tool said in its summary about so many kernels; `output` is the first of what it wrote if that is bad."""

    tool: str
    folder: str
    kernels: int
    summary: str
    ok: bool
    output: tuple[str, ...]


def find_sanitizer() -> str | None:
    """The command, or None where it is not installed."""
    return shutil.which(COMMAND) or max(glob(PLACES), default=None)


def sanitize(sanitizer: str, tool: str, folder: str, command: Sequence[str], seconds: float) -> SanitizerResult:
    """Watch a command that launches a folder's kernels with a tool.

    Raises `UnfinishedError` if the tool found nothing but not all kernels were launched, and `OutOfTimeError`.
    """
    output: list[str] = []
    launched = 0
    failure = None

    def told(line: str) -> None:
        nonlocal launched
        finding = finding_of(line)
        if finding is not None:
            launched = finding[1]
        elif line.startswith(OUTPUT):
            output.append(line)

    try:
        run_group([sanitizer, "--tool", tool, *command], told, seconds=seconds, silence=LONGEST)
    except UnfinishedError as error:  # a kernel in which something is found may also fail
        failure = error
    summaries = [match for line in output if (match := SUMMARY.match(line))]
    if not summaries or any(UNSUPPORTED in line for line in output):
        raise failure or UnfinishedError(" ".join(output[:2]) or "it said nothing")
    ok = summaries[-1][2] == "0"
    if ok and not launched:
        raise failure or UnfinishedError("no kernel was launched")
    return SanitizerResult(tool, folder, launched, summaries[-1][1], ok, () if ok else tuple(output[:LINES]))
