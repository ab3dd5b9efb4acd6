"""Slots, what they still hold, and which of it a new prompt can continue from."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.engines.slot_model import SlotModel
from runtime.errors import UserError
from runtime.scheduling.settings import ReuseMode, SchedulerSettings
from runtime.scheduling.snapshots import SavedPrefix, SnapshotStore

# Tokens that are worth a copy: below, computing them anew takes hardly longer, and a slot or a snapshot is better left
# to what it holds. It also keeps a first token that all prompts share from choosing their slots.
WORTH_A_COPY = 16


@dataclass
class Slot:
    """The scheduler's side of a slot."""

    index: int
    busy: bool = False
    last_used: int = 0
    whole_chunks: int = 0  # its first tokens that were computed by whole chunks of a prompt; for "exact" mode alone


@dataclass(frozen=True)
class Source:
    """A prefix of a prompt that a slot or a snapshot holds: `common` tokens, of which `usable` can be continued."""

    holder: Slot | SavedPrefix
    common: int
    usable: int
    held: int  # tokens that it holds in all


@dataclass(frozen=True)
class Reuse:
    """What a prompt continues from: `tokens` tokens, and why it could not be more."""

    tokens: int
    refused: str | None = None


class PrefixCache:
    """Hands out slots; those that are given back stay as they are until their slot is needed."""

    def __init__(self, model: SlotModel, mode: ReuseMode, snapshot_bytes: int) -> None:
        self._model = model
        self._mode = mode
        self._chunk = model.chunks[0]
        self._time = 0  # counts the slots that were given back, for the order of use
        self._slots = [Slot(index) for index in range(model.slots)]
        self.snapshots = SnapshotStore(snapshot_bytes)

    def has_free_slot(self) -> bool:
        """Whether `take` can be called."""
        return any(not slot.busy for slot in self._slots)

    def take(self, prompt: Sequence[int], *, reuse: bool = True) -> tuple[int, Reuse]:
        """A free slot that holds as many of the prompt's first tokens as can be had, and their number.

        Without `reuse` it is empty.
        """
        sources = self._sources(prompt) if reuse else []
        target = self._unused_longest()
        # a slot is taken for its prefix if little is lost with the rest of it; otherwise the prefix is copied
        free = [source for source in sources if isinstance(source.holder, Slot) and not source.holder.busy]
        own = _best([one for one in free if one.held - one.usable < WORTH_A_COPY or one.holder is target])
        best = _best(sources)
        if own is not None and best is not None and best.usable - own.usable < WORTH_A_COPY:
            assert isinstance(own.holder, Slot)
            target = own.holder
        target.busy = True
        return target.index, self._fill(target, sources)

    def reserve(self) -> int:
        """A free slot, for a prompt that is still being computed in another one; `fill` fills it later."""
        target = self._unused_longest()
        target.busy = True
        return target.index

    def fill(self, slot: int, prompt: Sequence[int]) -> Reuse:
        """Let a reserved slot hold as many of the prompt's first tokens as can be had."""
        return self._fill(self._slots[slot], self._sources(prompt))

    def give_back(self, slot: int, *, spoiled: bool = False) -> None:
        """The slot is free. What it holds stays, unless it is `spoiled`."""
        if spoiled:
            self._model.rewind(slot, 0)
        self._time += 1
        self._slots[slot] = Slot(
            slot, last_used=self._time, whole_chunks=0 if spoiled else self._slots[slot].whole_chunks
        )

    def snapshot_due(self, prompt: Sequence[int]) -> int | None:
        """The length of the prompt's whole chunks, of which `chunk_done` takes a snapshot; None if it takes none."""
        length = (len(prompt) - 1) // self._chunk * self._chunk
        return length if length and self.snapshots.budget and self._mode != "off" else None

    def chunk_done(self, slot: int, tokens: int, prompt: Sequence[int]) -> None:
        """Note that a prefill call has fed the last `tokens` tokens of the slot."""
        length = len(self._model.tokens(slot))
        if tokens == self._chunk:  # in "exact" mode it started where another one had ended
            self._slots[slot].whole_chunks = length
        if length == self.snapshot_due(prompt):
            self.snapshots.save(self._model, slot, self._slots[slot].whole_chunks)

    def _unused_longest(self) -> Slot:
        """The free slot that is empty or, if none is, was given back first."""
        free = [slot for slot in self._slots if not slot.busy]
        return min(free, key=lambda slot: (len(self._model.tokens(slot.index)) > 0, slot.last_used))

    def _sources(self, prompt: Sequence[int]) -> list[Source]:
        """Every holder of at least the prompt's first token. The last token is never reused: it gives the logits."""
        if self._mode == "off":
            return []
        wanted = list(prompt[:-1])
        sources = [
            self._source(wanted, slot, self._model.tokens(slot.index), self._model.least_rewind(slot.index))
            for slot in self._slots
        ]
        sources += [
            self._source(wanted, prefix, prefix.snapshot.tokens, prefix.least_rewind) for prefix in self.snapshots.saved
        ]
        return [source for source in sources if source.common]

    def _source(self, wanted: list[int], holder: Slot | SavedPrefix, held: Sequence[int], least_rewind: int) -> Source:
        common = common_prefix(wanted, held)
        if self._mode == "exact":
            common = min(common, holder.whole_chunks) // self._chunk * self._chunk
        usable = common if common == len(held) or common >= least_rewind else 0
        return Source(holder, common, usable, len(held))

    def _fill(self, target: Slot, sources: Sequence[Source]) -> Reuse:
        """Bring the longest usable prefix into `target`, which keeps its own where another is hardly longer."""
        own = next((source for source in sources if source.holder is target), None)
        best = _best(sources)
        if best is None or (own is not None and best.usable - own.usable < WORTH_A_COPY):
            best = own
        elif own is None and best.usable < WORTH_A_COPY:
            best = None
        length = 0 if best is None else best.usable
        self._keep_what_is_lost(target, length)
        if best is None or best.holder is target:
            self._rewind(target.index, length)
        elif isinstance(best.holder, Slot):
            self._model.copy_slot(best.holder.index, target.index, length)
        else:
            self._model.restore(target.index, best.holder.snapshot)
            self._rewind(target.index, length)
            self.snapshots.touch(best.holder)
        target.whole_chunks = 0 if best is None else min(best.holder.whole_chunks, length)
        return Reuse(length, _refusal(sources, length))

    def _rewind(self, slot: int, length: int) -> None:
        if length < len(self._model.tokens(slot)):
            self._model.rewind(slot, length)

    def _keep_what_is_lost(self, target: Slot, length: int) -> None:
        """Take a snapshot of what a slot holds beyond `length` tokens before it is overwritten."""
        if self._mode != "off" and len(self._model.tokens(target.index)) - length >= WORTH_A_COPY:
            self.snapshots.save(self._model, target.index, target.whole_chunks)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens with which both lists begin, found by halving: slices compare much faster than items."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def reuse_mode(model: SlotModel, settings: SchedulerSettings) -> ReuseMode:
    """The mode of the settings, or the model's own."""
    return settings.reuse or ("full" if model.same_bits_in_any_call else "exact")


def check_fits(prompt: Sequence[int], capacity: int | None, name: str = "the prompt") -> None:
    """Raise `UserError` if a prompt is longer than an empty slot; a `capacity` of None is without a limit."""
    if capacity is not None and len(prompt) > capacity:
        raise UserError(
            f"{name} has {len(prompt)} tokens, expected at most {capacity}, which a slot of the caches holds: "
            "shorten it, or compile with a larger shape.cache_len"
        )


def _best(sources: Sequence[Source]) -> Source | None:
    """The longest usable prefix; of equal ones one in a free slot, with the fewest tokens to forget."""

    def preference(source: Source) -> tuple[int, bool, int]:
        in_free_slot = isinstance(source.holder, Slot) and not source.holder.busy
        return source.usable, in_free_slot, -source.held

    return max((source for source in sources if source.usable), key=preference, default=None)


def _refusal(sources: Sequence[Source], length: int) -> str | None:
    """Why not more than `length` tokens are reused, if that costs a prompt more than a few."""
    longest = max(sources, key=lambda source: source.common, default=None)
    if longest is None or longest.usable or longest.common - length < WORTH_A_COPY:
        return None
    return (
        f"{longest.common} tokens of the prompt lie in a slot whose rolling cache has moved on: "
        "it no longer holds what the next token would see"
    )
