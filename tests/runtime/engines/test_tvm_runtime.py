"""TVM's runtime in a process of its own."""

import os
import subprocess
import sys

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
