"""The engine: one opened artifact whose slots each hold a sequence. It takes token ids and returns logits or outputs.

A slot has the caches of one sequence, and a list of the ids that they hold. Caches are rings: the key of position p is
in column p mod L of its slot's ring, and the compiled functions update them in place. A prompt runs in chunks, and a
step takes rows, each of which is the next token of a slot; several rows of one slot are consecutive tokens of it. What
a call does not need is padded with position -1, which the kernels neither write nor see.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.build_number import required_build
from runtime.artifact.caches import RING_BLOCK
from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import COLUMN, HEADS, IDS, POSITIONS, SLOTS, Manifest
from runtime.artifact.signing import key_of_environment
from runtime.artifact.targets import TARGETS
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import NOT_FINITE, Sampler
from runtime.engines.call_sizes import call_sizes
from runtime.engines.loaded_artifact import HIDDEN, MAX_STEPS_IN_FLIGHT, PADDING_ID, Call, LoadedArtifact
from runtime.engines.machines import MACHINES
from runtime.engines.slot_model import Row, Snapshot
from runtime.errors import UserError

LAST_POSITION = 2**31 - 1  # kernels count positions in 32 bits
LEAST_THREAD_LIMIT = 16  # of any machine; more than a few for each core only get in each other's way


@dataclass
class _Slot:
    tokens: list[int] = field(default_factory=list)
    written: int = 0  # the most tokens that the rings have held since the slot was last empty


@dataclass
class Engine:
    """An artifact, ready to run."""

    manifest: Manifest
    folder: Path
    loaded: LoadedArtifact
    _held: list[_Slot] = field(init=False)
    _draw_call: object = field(init=False, default=None)  # the draw call that owns the steps in flight

    def __post_init__(self) -> None:
        self._held = [_Slot() for _ in range(self.slots)]
        windows = self.manifest.model.cache_lens(self.manifest.shape.cache_len)
        rings = self.manifest.model.ring_lens(self.manifest.shape.cache_len, self.manifest.shape.longest_call)
        self._rings = list(zip(rings, windows, strict=True))  # columns of each, and those that one query sees

    @classmethod
    def open(
        cls, artifact: Path, *, threads: int | None = None, public_key: Path | None = None, minimum_build: int = 0
    ) -> Self:
        """Check an artifact in full and open it; `threads` defaults to the number of cores that this process may use.

        If there is a `public_key`, or the environment names one, its owner must have signed the artifact, whose build
        number must be at least `minimum_build` and what the environment requires. Raises `UserError` if a check fails,
        and for a number of threads that no machine uses.
        """
        most = max(LEAST_THREAD_LIMIT, 4 * (os.cpu_count() or 1))
        if threads is not None and not 1 <= threads <= most:
            raise UserError(f"the number of threads is {threads}, expected 1 to {most}, or none to use all cores")
        opened = Artifact.open(
            artifact, public_key=public_key or key_of_environment(), minimum_build=required_build(minimum_build)
        )
        load = MACHINES[opened.manifest.target.kind].load
        return cls(opened.manifest, opened.folder, load(opened, threads or len(os.sched_getaffinity(0))))

    @property
    def cpu_level(self) -> str | None:
        """LLVM's name of the CPU level whose library runs; None if no library does."""
        return self.loaded.cpu_level

    @property
    def slots(self) -> int:
        """Number of sequences."""
        return self.manifest.shape.slots

    @property
    def step_rows(self) -> Sequence[int]:
        """Rows that a step may have, ascending; fewer rows run as the smallest step that holds them."""
        return self.manifest.shape.step_rows

    @property
    def chunks(self) -> Sequence[int]:
        """Most tokens of a prefill call, descending."""
        return self.manifest.shape.prefill_chunks

    @property
    def same_bits_in_any_call(self) -> bool:
        """Whether a token's results are the same bits whichever call computes them."""
        return TARGETS[self.manifest.target.kind].same_bits_in_any_call

    def tokens(self, slot: int) -> Sequence[int]:
        """The ids that a slot's caches hold, in order."""
        return self._held[slot].tokens

    def room(self, slot: int) -> int | None:
        """How many more tokens fit a slot; None if every layer has a window, so that any number fits."""
        if self.manifest.model.every_layer_windowed:
            return None
        return self.manifest.shape.cache_len - len(self._held[slot].tokens)

    def least_rewind(self, slot: int) -> int:
        """The fewest tokens, above none, to which a slot can be rewound.

        In a ring of L columns that has wrapped, a token of position p needs the W - 1 columns before it, and all but
        the last L positions are lost.
        """
        written = self._held[slot].written
        return max((written - (ring - window + 1) for ring, window in self._rings if written > ring), default=0)

    def rewind(self, slot: int, length: int) -> None:
        """Forget all tokens from `length` on; raises `UserError` if the tokens before them no longer suffice."""
        self._check_rewind(slot, length)
        held = self._held[slot]
        del held.tokens[length:]
        held.written = held.written if length else 0

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source`; raises `UserError` as `rewind` does."""
        self._check_rewind(source, length)
        if source != target:
            held = self._held[source]
            self.loaded.caches.copy(source, target, _blocks(held.written))
            self._held[target] = _Slot(list(held.tokens), held.written)
        self.rewind(target, length)

    def save(self, slot: int) -> Snapshot:
        """A copy of what a slot holds."""
        held = self._held[slot]
        return Snapshot(tuple(held.tokens), held.written, self.loaded.caches.read(slot, _blocks(held.written)))

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Let a slot hold what a snapshot does."""
        self.loaded.caches.write(slot, snapshot.columns)
        self._held[slot] = _Slot(list(snapshot.tokens), snapshot.written)

    def prefill(self, slot: int, ids: Sequence[int], *, size: int | None = None) -> NDArray[np.float32]:
        """Append ids to a slot in one call; returns float32 logits (vocab,) after the last one.

        The call is the smallest that holds them, or that of `size` tokens. Raises `UserError` for ids outside the
        vocabulary, for none or more than the call holds, for ids that do not fit the caches, and for a head that
        generates no text.
        """
        self._check_head(generates=True)
        return self.outputs(slot, ids, size=size)[-1]

    def step(self, rows: Sequence[Row], *, size: int | None = None) -> NDArray[np.float32]:
        """Append one id for each row, in one call; returns float32 logits (n, vocab).

        Rows of one slot are consecutive tokens of it, in the order in which they are given. The step is the smallest
        that holds them, or that of `size` rows. Raises `UserError` as `prefill`.
        """
        self._check_head(generates=True)
        for slot in dict.fromkeys(row.slot for row in rows):
            self._check(slot, [row.token_id for row in rows if row.slot == slot])
        call = self.loaded.functions[f"step_{_fitting(len(rows), self.step_rows, size)}"]
        call.inputs[IDS][len(rows) :], call.inputs[POSITIONS][len(rows) :] = PADDING_ID, HIDDEN
        call.inputs[SLOTS][len(rows) :] = 0
        added: dict[int, list[int]] = {}
        for i, (slot, token_id) in enumerate(rows):
            new = added.setdefault(slot, [])
            call.inputs[IDS][i], call.inputs[SLOTS][i] = token_id, slot
            call.inputs[POSITIONS][i] = len(self._held[slot].tokens) + len(new)
            new.append(token_id)
        return self._run(call, added)[: len(rows), 0].copy()

    def feed(self, slot: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append any number of ids to a slot, in as many calls as they take; returns and raises as `prefill`."""
        self._check_head(generates=True)
        self._check(slot, ids)
        logits, start = np.empty(0, np.float32), 0
        for size in call_sizes(len(ids), self.chunks, self.step_rows):
            part = ids[start : start + size]
            if size in self.chunks:
                logits = self.prefill(slot, part)
            else:
                logits = self.step([Row(slot, token_id) for token_id in part])[-1]
            start += size
        return logits

    def head_outputs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The head's outputs for one text: (tokens, n_outputs), or (1, n_outputs) for the last token.

        Slot 0 is used, and empty afterwards. Raises `UserError` in the same cases as `feed`, and for a head that
        generates text.
        """
        self._check_head(generates=False)
        self.rewind(0, 0)
        self._check(0, ids)
        outputs, start = [], 0
        for size in call_sizes(len(ids), self.chunks, ()):
            outputs.append(self.outputs(0, ids[start : start + size]))
            start += size
        self.rewind(0, 0)
        return np.concatenate(outputs) if HEADS[self.manifest.model.head].every_token else outputs[-1]

    def can_draw(self, options: SamplingOptions) -> bool:
        """Whether `draw` can replace `step` and a sampler with these options."""
        return self.loaded.device_sampler is not None and options.top_k_alone

    def draw(self, slot: int, token_id: int, sampler: Sampler, steps: int) -> Iterator[int]:
        """Yield `steps` ids that follow `token_id`, as alternating `step` and `Sampler.sample` would give them.

        Each is appended to the sampler's text. They may differ only through float32 rounding. Requires `can_draw`. The
        next step is started before an id is yielded, so that the device need not wait for the caller; that step's
        column counts only once the caller asks for the next id, and its column is the one that any other id would take.
        An iterator ends when another one begins, and at any other call of a compiled function. Raises `UserError` like
        `step`, and for any logit that is infinite or NaN.
        """
        device_sampler, room, held = self.loaded.device_sampler, self.room(slot), self._held[slot]
        assert device_sampler is not None
        assert room is None or steps <= room
        self._check(slot, [token_id])
        device_sampler.begin(token_id, len(held.tokens), slot)
        this_call = self._draw_call = object()
        in_flight = 0
        try:
            for left in range(steps, 0, -1):
                while in_flight < min(MAX_STEPS_IN_FLIGHT, left):
                    device_sampler.start(*sampler.device_options(in_flight))
                    in_flight += 1
                    held.written = max(held.written, len(held.tokens) + in_flight)
                drawn = device_sampler.finish()
                in_flight -= 1
                if drawn < 0:
                    raise UserError(NOT_FINITE)
                held.tokens.append(token_id)
                token_id = drawn
                sampler.append(drawn)
                yield drawn
                if self._draw_call is not this_call:
                    return
        finally:
            if self._draw_call is this_call:
                self._end_draws()

    def outputs(self, slot: int, ids: Sequence[int], *, size: int | None = None) -> NDArray[np.float32]:
        """As `prefill`, for any head: its outputs (tokens, n_outputs), or (1, n_outputs) for the last token."""
        self._check(slot, ids)
        call = self.loaded.functions[f"prefill_{_fitting(len(ids), self.chunks[::-1], size)}"]
        first = len(self._held[slot].tokens)
        call.inputs[IDS][0, : len(ids)], call.inputs[IDS][0, len(ids) :] = ids, PADDING_ID
        call.inputs[POSITIONS][0, : len(ids)] = np.arange(first, first + len(ids))
        call.inputs[POSITIONS][0, len(ids) :] = HIDDEN
        call.inputs[SLOTS][0] = slot
        if COLUMN in call.inputs:
            call.inputs[COLUMN][0] = len(ids) - 1
        outputs = self._run(call, {slot: ids})[0]
        return outputs[: len(ids)].copy() if HEADS[self.manifest.model.head].every_token else outputs.copy()

    def _run(self, call: Call, added: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
        """The outputs of a call that appends these ids to each slot.

        A slot has new tokens only once the call is over: an interrupt leaves it as it was, or nearly.
        """
        self._end_draws()  # which have inputs of a call on the device
        for slot, ids in added.items():
            self._held[slot].written = max(self._held[slot].written, len(self._held[slot].tokens) + len(ids))
        outputs = call()
        for slot, ids in added.items():
            self._held[slot].tokens.extend(ids)
        return outputs

    def _end_draws(self) -> None:
        if self._draw_call is not None and self.loaded.device_sampler is not None:
            self.loaded.device_sampler.abandon()
        self._draw_call = None

    def _check_head(self, *, generates: bool) -> None:
        model = self.manifest.model
        if model.generates != generates:
            use = "generates text" if model.generates else "generates no text"
            raise UserError(
                f"the artifact {self.manifest.name} has the head {model.head}, which {use}; "
                f"run `python -m {HEADS[model.head].command}`"
            )

    def _check_rewind(self, slot: int, length: int) -> None:
        held, least = len(self._held[slot].tokens), self.least_rewind(slot)
        if not 0 <= length <= held or 0 < length < least:
            raise UserError(
                f"slot {slot} holds {held} tokens and cannot be rewound to {length}, "
                f"expected 0 or {least} to {held}; empty it and feed the tokens again"
            )

    def _check(self, slot: int, ids: Sequence[int]) -> None:
        """Refuse everything that could make a call wrong before the caches change."""
        if not 0 <= slot < self.slots:
            raise UserError(f"slot {slot} was asked for, expected 0 to {self.slots - 1}, which shape.slots gives")
        if not ids:
            raise UserError("a prompt is empty; expected at least one token")
        vocab_size = self.manifest.model.vocab_size
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise UserError(
                f"token id {min(ids) if min(ids) < 0 else max(ids)} is outside the vocabulary of {vocab_size}"
            )
        room, held = self.room(slot), len(self._held[slot].tokens)
        if held + len(ids) > LAST_POSITION:
            raise UserError(f"the text would reach position {LAST_POSITION}, the last one; empty the slot first")
        if room is not None and len(ids) > room:
            raise UserError(
                f"{len(ids)} more tokens do not fit: the slot has room for {room} of "
                f"{self.manifest.shape.cache_len}; compile with a larger shape.cache_len"
            )


def _fitting(count: int, sizes: Sequence[int], size: int | None) -> int:
    """The smallest of ascending sizes that holds `count` tokens, or `size`; raises `UserError` if none does."""
    fitting = [known for known in sizes if known >= count and size in (None, known)]
    if not fitting or not count:
        raise UserError(f"a call is given {count} tokens, expected 1 to {size or sizes[-1]}")
    return fitting[0]


def _blocks(columns: int) -> int:
    """Columns rounded up to whole blocks of a ring."""
    return -(-columns // RING_BLOCK) * RING_BLOCK
