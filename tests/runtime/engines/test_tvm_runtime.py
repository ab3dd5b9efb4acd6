"""TVM's runtime in a process of its own."""

import os
import subprocess
import sys

import pytest

from export.stage import ROOT
from runtime.engines.tvm_runtime import IDLE_PASSES

# prints the CPU seconds that a process with an idle pool of two threads spends
IDLE = """
import sys, time
from pathlib import Path
from runtime.engines.engine import Engine

engine = Engine.open(Path(sys.argv[1]), threads=2)
engine.feed(0, [1, 2, 3])
begin = time.process_time()
time.sleep(0.5)
print(time.process_time() - begin)
"""
PASS_LIMIT = 4e-6  # CPU seconds; one pass is one sched_yield, which takes a tenth of this


def test_an_idle_pool_sleeps(compile_case):
    """If it went on for TVM's own number of passes, a process on a busy machine would take minutes to end."""
    environment = {name: value for name, value in os.environ.items() if name != "TVM_THREAD_POOL_SPIN_COUNT"}
    command = [sys.executable, "-c", IDLE, compile_case("windowed").artifact]
    idle = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert float(idle.stdout) < IDLE_PASSES * PASS_LIMIT


# prints the bits of the logits of a chunk and of a step
LOGITS = """
import sys
from pathlib import Path
from runtime.engines.engine import Engine
from runtime.engines.slot_model import Row

engine = Engine.open(Path(sys.argv[1]), threads=int(sys.argv[2]))
print(engine.feed(0, [5, 6, 7, 8, 9, 10, 11]).tobytes().hex(), engine.step([Row(0, 3)]).tobytes().hex())
"""


@pytest.mark.parametrize("threads", [3, 16])
def test_more_threads_than_cores_change_no_bit(compile_case, threads):
    """Nor do more than there are panels in some products, which leaves threads without any."""
    artifact = compile_case("int8_dynamic").artifact

    def logits(count):
        command = [sys.executable, "-c", LOGITS, artifact, str(count)]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()

    found = logits(threads)
    assert len(found) == 2
    assert found == logits(1)
