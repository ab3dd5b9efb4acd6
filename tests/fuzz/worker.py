"""Runs cases in a forked process with limits on time and memory, which a finding may end in any way.

The process tells the number of each case before it begins, so whatever ends the process belongs to that case.
"""

import faulthandler
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from export.stage import ROOT
from runtime.errors import UserError
from tests.fuzz.limits import CPU_SECONDS, WALL_SECONDS, limit_memory, start_clock, stop_clock
from tests.fuzz.reader import Reader, WrongResult

LONGEST_REFUSAL = 2500  # characters
FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Outcome:
    """How one case ended; a finding has a kind, which is the same for all inputs with the same fault."""

    case: str
    accepted: bool = False
    kind: str | None = None
    text: str = ""


def run_cases(reader: Reader, cases: Iterable[str], seconds: float = float("inf")) -> Iterator[Outcome]:
    """Run cases in order, until all are done or `seconds` have passed."""
    left, end = iter(list(cases)), time.monotonic() + seconds
    first = next(left, None)
    while first is not None:
        todo = [first, *left]
        done = 0
        for outcome in _one_process(reader, todo, end):
            yield outcome
            done += 1
        left = iter(todo[done:])
        first = next(left, None) if time.monotonic() < end else None


def _one_process(reader: Reader, cases: list[str], end: float) -> Iterator[Outcome]:
    """Run cases in one process, until it ends for whatever reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as said:
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _work(reader, cases, end, os.fdopen(write_end, "w"), said)
        os.close(write_end)
        begun = None
        with os.fdopen(read_end) as answers:
            for line in answers:
                answer = json.loads(line)
                begun = answer.get("begun")
                if begun is None:
                    yield Outcome(**answer)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        if begun is not None:
            yield _killed(begun, status, said.read())
        elif status:
            raise RuntimeError(f"a process ended with {status} between two cases: {said.read()}")


def _work(reader: Reader, cases: list[str], end: float, answers: IO[str], said: IO[str]) -> None:
    """The forked process; it never returns."""
    try:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_memory()
        faulthandler.disable()  # a library may have put its own handlers in the place of those of pytest
        faulthandler.enable(said)
        for number in (signal.SIGPROF, signal.SIGALRM):  # the trace is written, and then the process dies of it
            signal.signal(number, signal.SIG_DFL)
            faulthandler.register(number, said, chain=True)
        for case in cases:
            if time.monotonic() >= end:
                break
            print(json.dumps({"begun": case}), file=answers, flush=True)
            said.seek(0)
            said.truncate()
            outcome = _run(reader, case)
            print(json.dumps(vars(outcome)), file=answers, flush=True)
        os._exit(0)
    finally:
        os._exit(1)


def _run(reader: Reader, case: str) -> Outcome:
    data = reader.input_of(case)
    start_clock()
    try:
        reader.check(data)
    except UserError as error:
        outcome = _refused(case, error)
    except WrongResult as error:
        outcome = Outcome(case, kind=f"wrong result: {error}", text=_last_line(error))
    except BaseException as error:  # a panic of a library in Rust is no Exception
        outcome = Outcome(case, kind=f"{type(error).__name__} in {_place_of(error)}", text=_last_line(error))
    else:
        outcome = Outcome(case, accepted=True)
    finally:
        stop_clock()
    return outcome


def _refused(case: str, error: UserError) -> Outcome:
    """A refusal, if it is one sentence that a terminal can show, and no cover for exhausted memory."""
    text = str(error)
    if any(isinstance(cause, MemoryError) for cause in _causes(error)):
        return Outcome(case, kind=f"more memory than allowed in {_place_of(error)}", text=text[:200])
    odd = {unicodedata.category(character) for character in text} & {"Cc", "Cs", "Zl", "Zp"}
    fault = next(
        (
            name
            for name, found in (
                ("empty refusal", not text.strip()),
                ("refusal of many lines or with control characters", odd),
                ("endless refusal", len(text) > LONGEST_REFUSAL),
            )
            if found
        ),
        None,
    )
    if fault is None:
        return Outcome(case)
    shown = ascii(text)
    return Outcome(case, kind=f"{fault} in {_place_of(error)}", text=shown if len(shown) < 400 else shown[:400] + "...")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place_of(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
    return _innermost(list(reversed(frames)))


def _innermost(frames: list[tuple[str, str]]) -> str:
    """The first line of ours among the frames of a trace, the innermost first; tests count only if nothing else is."""
    places = [f"{Path(name).relative_to(ROOT)}:{line}" for name, line in frames if Path(name).is_relative_to(ROOT)]
    return next((place for place in places if not place.startswith(("tests/", ".venv/"))), (places or ["?"])[0])


def _last_line(error: BaseException) -> str:
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return text.encode("ascii", "backslashreplace").decode()[:400]


def _killed(case: str, status: int, said: str) -> Outcome:
    reasons = {
        -signal.SIGPROF: f"more than {CPU_SECONDS:g} s of CPU time",
        -signal.SIGALRM: f"more than {WALL_SECONDS:g} s",
    }
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    trace = said[said.find("Current thread") :] if "Current thread" in said else said
    frames = FRAME.findall(trace)
    shown = " < ".join(f"{Path(file).name}:{line}" for file, line in frames[:6])
    return Outcome(case, kind=f"{reasons.get(status, name)} in {_innermost(frames)}", text=shown or said[-400:])
