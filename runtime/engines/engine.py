"""The engine: one opened artifact with its caches. It takes token ids and returns logits, or another head's outputs.

Caches are ring buffers: the key of position p is in slot p mod W, and the compiled functions update them in place. A
prompt runs in chunks; if the first chunk is not full, it is padded on the left with negative positions, which the
kernels neither write nor see.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.build_number import required_build
from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import HEADS, Manifest
from runtime.artifact.signing import key_of_environment
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import NOT_FINITE, Sampler
from runtime.engines.loaded_artifact import MAX_STEPS_IN_FLIGHT, PADDING_ID, LoadedArtifact
from runtime.engines.machines import MACHINES
from runtime.errors import UserError

LAST_POSITION = 2**31 - 1  # kernels count positions in 32 bits
LEAST_THREAD_LIMIT = 16  # of any machine; more than a few for each core only get in each other's way


@dataclass
class Engine:
    """An artifact, ready to run. `lengths` counts the tokens that each batch row has been fed."""

    manifest: Manifest
    folder: Path
    loaded: LoadedArtifact
    lengths: NDArray[np.int64] = field(init=False)
    _draw_call: object = field(init=False, default=None)  # the draw call that owns the steps in flight

    def __post_init__(self) -> None:
        self.lengths = np.zeros(self.batch, np.int64)

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
    def batch(self) -> int:
        """Rows that every call computes."""
        return self.manifest.shape.batch

    @property
    def caches(self) -> list[Any]:
        """One object for each cache of the signature: arrays on a CPU, tensors on a GPU."""
        return self.loaded.caches

    @property
    def position(self) -> int:
        """Tokens fed so far (row 0)."""
        return int(self.lengths[0])

    def room(self) -> int | None:
        """How many more tokens fit the caches; None if every layer has a window, so that any number fits."""
        if self.manifest.model.every_layer_windowed:
            return None
        return self.manifest.shape.cache_len - int(self.lengths.max())

    def reset(self) -> None:
        """Forget everything fed so far. Stale slots need no clearing: no later position can see them."""
        self.lengths[:] = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append one list of ids to each row; returns float32 logits (B, vocab) after each row's last token.

        Rows may differ in length while the engine is empty; after that they must have equal lengths. Raises `UserError`
        for ids outside the vocabulary, empty or uneven prompts, prompts that do not fit the caches, and a head that
        generates no text.
        """
        self._check_head(generates=True)
        self._check(prompts)
        logits = np.empty(0, np.float32)
        for outputs in self._chunks(prompts):
            logits = outputs[:, -1].copy()
        return logits

    def head_outputs(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The head's outputs for one list of ids per row, starting from empty caches.

        Each row gives (tokens, n_outputs), or (1, n_outputs) for the last token. Rows may differ in length; the caches
        are empty afterwards. Raises `UserError` in the same cases as `prefill`, and for a head that generates text.
        """
        self._check_head(generates=False)
        self.reset()
        self._check(texts)
        every_token = HEADS[self.manifest.model.head].every_token
        columns = [outputs.copy() for outputs in self._chunks(texts)]
        self.reset()
        joined = np.concatenate(columns if every_token else columns[-1:], axis=1)
        return [joined[row, -len(text) if every_token else -1 :] for row, text in enumerate(texts)]

    def _chunks(self, prompts: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        """Append one list of ids to each row, chunk by chunk; yields each call's outputs, which the next overwrites."""
        longest = max(len(prompt) for prompt in prompts)
        sizes = chunk_sizes(
            longest, tuple(self.loaded.functions), may_pad=self.position == 0, may_decode=self.manifest.model.generates
        )
        padded = sum(sizes)
        ids = np.full((self.batch, padded), PADDING_ID, np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, padded - len(prompt) :] = prompt
        # position of each row's first column
        first = self.lengths + np.array([len(prompt) for prompt in prompts]) - padded
        start = 0
        for size in sizes:
            yield self._call(size, ids[:, start : start + size], first + start)
            start += size
        self.lengths += [len(prompt) for prompt in prompts]

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id to each row; returns float32 logits (B, vocab). Raises `UserError` like `prefill`."""
        self._check_head(generates=True)
        prompts = [[token_id] for token_id in ids]
        self._check(prompts)
        logits = self.step(1, np.array(prompts, np.int64), self.lengths)
        self.lengths += 1
        return logits

    def can_draw(self, options: SamplingOptions) -> bool:
        """Whether `draw` can replace `decode` and a sampler with these options."""
        return self.loaded.device_sampler is not None and options.top_k_alone

    def draw(self, token_id: int, sampler: Sampler, steps: int) -> Iterator[int]:
        """Yield `steps` ids that follow `token_id`, as alternating `decode` and `Sampler.sample` would give them.

        Each is appended to the sampler's text. They may differ only through float32 rounding. Requires `can_draw`. The next step is started before an id is
        yielded, so that the device need not wait for the caller; that step's column counts only once the caller asks
        for the next id, and its slot is the one that any other id would take. An iterator ends when another one begins.
        Raises `UserError` like `decode`, and for any logit that is infinite or NaN.
        """
        device_sampler, room = self.loaded.device_sampler, self.room()
        assert device_sampler is not None
        assert room is None or steps <= room
        self._check([[token_id]])
        device_sampler.begin(token_id, self.position)
        this_call = self._draw_call = object()
        in_flight = 0
        try:
            for left in range(steps, 0, -1):
                while in_flight < min(MAX_STEPS_IN_FLIGHT, left):
                    device_sampler.start(*sampler.device_options(in_flight))
                    in_flight += 1
                drawn = device_sampler.finish()
                in_flight -= 1
                if drawn < 0:
                    raise UserError(NOT_FINITE)
                self.lengths += 1
                sampler.append(drawn)
                yield drawn
                if self._draw_call is not this_call:
                    return
        finally:
            if self._draw_call is this_call:
                device_sampler.abandon()

    def step(self, tokens: int, ids: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.float32]:
        """One compiled call on ids (B, T) at positions first .. first + T - 1 of each row.

        Returns the last token's outputs (B, n_outputs).
        """
        return self._call(tokens, ids, first)[:, -1].copy()

    def _call(self, tokens: int, ids: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.float32]:
        """Like `step`, but returns outputs (B, T, n_outputs) or (B, 1, n_outputs) in memory that the machine reuses."""
        id_buffer, position_buffer = self.loaded.inputs[tokens]
        id_buffer[...] = ids
        position_buffer[...] = first[:, None] + np.arange(tokens)
        return self.loaded.functions[tokens]()

    def _check_head(self, *, generates: bool) -> None:
        model = self.manifest.model
        if model.generates != generates:
            use = "generates text" if model.generates else "generates no text"
            raise UserError(
                f"the artifact {self.manifest.name} has the head {model.head}, which {use}; "
                f"run `python -m {HEADS[model.head].command}`"
            )

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Refuse everything that could make a call wrong before the caches change."""
        if len(prompts) != self.batch:
            raise UserError(
                f"{len(prompts)} sequences were given, "
                f"expected shape.batch = {self.batch}, which the artifact was compiled for"
            )
        if not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt is empty; expected at least one token")
        if self.position > 0 and len({len(prompt) for prompt in prompts}) > 1:
            raise UserError(
                "rows of a batch can only be continued by the same number of tokens; "
                "feed everything at once, or reset first"
            )
        vocab_size = self.manifest.model.vocab_size
        for prompt in prompts:
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise UserError(
                    f"token id {min(prompt) if min(prompt) < 0 else max(prompt)} "
                    f"is outside the vocabulary of {vocab_size}"
                )
        room, longest = self.room(), max(len(prompt) for prompt in prompts)
        if int(self.lengths.max()) + longest > LAST_POSITION:
            raise UserError(f"the text would reach position {LAST_POSITION}, the last one; reset the engine first")
        if room is not None and longest > room:
            cache_len = self.manifest.shape.cache_len
            raise UserError(
                f"{longest} more tokens do not fit: the caches have {room} of {cache_len} slots free; "
                "compile with a larger shape.cache_len"
            )


def chunk_sizes(length: int, available: Sequence[int], *, may_pad: bool, may_decode: bool = True) -> list[int]:
    """Sizes of the calls that feed `length` tokens, in order.

    `available` are the graphs' sizes; they include 1 (decode) if `may_decode`.

    Greedy, largest first. A remainder smaller than the smallest chunk fills one more such chunk, padded and put first,
    if `may_pad`; otherwise, or if it is a single token and `may_decode`, it is fed token by token. So the sum exceeds
    `length` by less than the first size, and only if that is a chunk.
    Worked example with sizes 16, 4 and 1: 23 tokens are 4 + 16 + 4 with one padded, or 16 + 4 + 1 + 1 + 1 unpadded.
    """
    assert may_pad or may_decode, "nothing can feed the remaining tokens"
    chunks = sorted(available, reverse=True)[: -1 if may_decode else None]
    sizes: list[int] = []
    rest = length
    for chunk in chunks:
        sizes += [chunk] * (rest // chunk)
        rest %= chunk
    if may_pad and chunks and rest > int(may_decode):
        return [chunks[-1], *sizes]
    return sizes + [1] * rest
