"""What torch reaches on this GPU: the matrix peak, and a model's matrix products in fp16. In a process of its own, with any Python that has torch.

As a script it imports nothing of this project: it reads JSON from its input and writes JSON.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PYTHONS = (sys.executable, "python3", "/usr/bin/python3", "/usr/local/bin/python3")
SCRIPT = Path(__file__).with_name("torch_script.py")
LONGEST = 90  # seconds


@dataclass(frozen=True)
class Product:
    """(rows, k) times (n, k) transposed, `calls` times in one pass of a graph."""

    graph: str
    rows: int
    n: int
    k: int
    calls: int


@dataclass(frozen=True)
class TorchTimes:
    """TFLOP/s of a large fp16 product, and the seconds of all products of a pass, by graph."""

    peak_tflop_s: float
    seconds: dict[str, float]


def ask_torch(products: Sequence[Product]) -> TorchTimes | None:
    """Measure with the first Python here that has torch and a GPU; None where there is none, and a line on standard error that says why."""
    reasons = []
    for python in dict.fromkeys(filter(None, map(shutil.which, PYTHONS))):
        asked = json.dumps([asdict(product) for product in products])
        try:
            done = subprocess.run([python, str(SCRIPT)], input=asked, capture_output=True, text=True, check=False, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            reasons.append(f"{python}: nothing after {LONGEST} s")
            break
        if done.returncode == 0:
            return TorchTimes(**json.loads(done.stdout))
        reasons.append(f"{python}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    print(f"without torch ({'; '.join(reasons) or 'no python3 here'})", file=sys.stderr)
    return None
