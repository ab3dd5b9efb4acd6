"""An artifact's golden prompts."""

from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from runtime.artifact.golden import GoldenPrompt, read_golden, tensors_of
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.readers.safetensors_file import reference, spoil


def open_reader(folder: Path) -> Reader:
    rng = np.random.default_rng(0)
    prompts = [
        GoldenPrompt(np.arange(n), rng.standard_normal((n + 1, 6)).astype(np.float32), np.arange(n)) for n in (3, 4)
    ]
    return Reader([save(tensors_of(prompts))], spoil, partial(check, folder / "golden.safetensors"))


def check(path: Path, data: bytes) -> None:
    place(path, data)
    ours, theirs = tensors_of(read_golden(path)), reference(data)
    for name, array in ours.items():
        demand(array.tobytes() == theirs[name].tobytes(), "a tensor has other numbers than the package reads")
