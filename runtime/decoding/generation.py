"""When a sequence ends, and the samplers of several that are drawn from one seed."""

from collections.abc import Sequence

from runtime.decoding.constraint import Grammar
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import Sampler
from runtime.text.stream import FinishReason


def finish_reason_of(token_id: int, left: int, eos_ids: Sequence[int]) -> FinishReason | None:
    """The reason that a sequence ends with this id; None if it goes on. `left` ids, including this one, may follow."""
    return "stop" if token_id in eos_ids else "length" if left == 1 else None


def row_samplers(options: SamplingOptions, count: int, grammar: Grammar | None = None) -> list[Sampler]:
    """A sampler for each of so many sequences, whose options are numbered; each keeps to the grammar by itself."""
    return [Sampler(options.numbered(i), constraint=grammar.begin() if grammar else None) for i in range(count)]
