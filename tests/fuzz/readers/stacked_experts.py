"""A mixture pickled by torch as Mixtral was first released: all experts of a layer in one matrix."""

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tests.fuzz.limits import start_clock
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.readers.pth_file import spoil
from tests.fuzz.tiny_files import DIM, HIDDEN, MISTRAL, PARAMS, opened, tensors, write_mistral

EXPERTS = 2
LAYER = "layers.0.block_sparse_moe"
GATE = f"{LAYER}.gate.weight"


def open_reader(folder: Path) -> Reader:
    checkpoint = write_mistral(folder / "checkpoint")
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": 1}
    (checkpoint / "params.json").write_text(json.dumps(PARAMS | {"moe": moe}))
    torch.set_num_threads(1)  # a forked process has no other threads
    known = {
        "a router that is one number": saved({GATE: torch.tensor(1.0)}),
        "a router for a billion experts without rows": saved(
            {GATE: torch.zeros(10**9, 0), **{f"{LAYER}.w{x}": torch.zeros(0, DIM) for x in "123"}}
        ),
    }
    return Reader([saved({})], spoil, partial(check, checkpoint), known)


def saved(changes: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    rng = torch.Generator().manual_seed(0)
    held = {name: torch.from_numpy(array) for name, array in tensors(MISTRAL).items() if "feed_forward" not in name}
    held[GATE] = torch.randn(EXPERTS, DIM, generator=rng)
    held |= {f"{LAYER}.w{x}": torch.randn(EXPERTS * HIDDEN, DIM, generator=rng) for x in "123"}
    torch.save(held | changes, file)
    return file.getvalue()


def check(checkpoint: Path, data: bytes) -> None:
    path = place(checkpoint / "consolidated.00.pt", data)
    ours = opened(checkpoint, "mistral")
    start_clock()
    theirs = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for x in "123":
        rows = theirs[f"{LAYER}.w{x}"].reshape(EXPERTS, HIDDEN, DIM)
        for e, expected in enumerate(rows.transpose(1, 2) if x == "2" else rows):
            found = ours.source.read(f"layers.0.feed_forward.experts.{e}.w{x}.weight", slice(None))
            same = found.tobytes() == np.ascontiguousarray(expected.numpy()).tobytes()
            demand(same, "an expert has other numbers than its rows")
