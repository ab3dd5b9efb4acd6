"""The settings of a scheduler."""

import math
from dataclasses import dataclass
from typing import Literal

from runtime.errors import UserError

ReuseMode = Literal["full", "exact", "off"]
REUSE_MODES: tuple[ReuseMode, ...] = ("full", "exact", "off")


@dataclass(frozen=True)
class SchedulerSettings:
    """Raises `UserError` for values out of range.

    stall_budget: seconds that a prompt's chunk may hold up the sequences that are being generated.
    steps_per_chunk: steps that these are granted for each chunk.
    reuse: whether a prompt continues from tokens that a slot or a snapshot holds. "full" reuses any of them; "exact"
    only a prompt's whole chunks, so that a reused token was computed by the very call that would compute it anew; None
    is "full" where results do not depend on the call, and "exact" elsewhere.
    snapshot_bytes: memory for snapshots; 0 keeps none.
    speculate: whether tokens are guessed and checked; None does so where results do not depend on the call.
    most_drafts: guessed tokens of a sequence in one step.
    """

    stall_budget: float = 0.1
    steps_per_chunk: int = 4
    reuse: ReuseMode | None = None
    snapshot_bytes: int = 0
    speculate: bool | None = None
    most_drafts: int = 7

    def __post_init__(self) -> None:
        _require("stall_budget", self.stall_budget, 0 <= self.stall_budget < math.inf, "a finite number of at least 0")
        _require("steps_per_chunk", self.steps_per_chunk, self.steps_per_chunk >= 1, "at least 1")
        _require("reuse", self.reuse, self.reuse in (None, *REUSE_MODES), f"one of {', '.join(REUSE_MODES)}")
        _require("snapshot_bytes", self.snapshot_bytes, self.snapshot_bytes >= 0, "at least 0")
        _require("most_drafts", self.most_drafts, self.most_drafts >= 1, "at least 1")


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"the scheduler's setting {name} is {value}, expected {expected}")
