"""An engine's logits against those of onnxruntime on the graphs that it was compiled from."""

from collections.abc import Sequence

import numpy as np

from export.onnx_graphs.graphs import OnnxGraphs
from runtime.engines.engine import Engine, Row
from tests.helpers import reference
from tests.helpers.artifacts import onnx_shifted, random_ids
from tests.helpers.feeding import emptied, stepwise


def check_steps_and_prefills(graphs: OnnxGraphs, engine: Engine, window: int, longest: int, bound: float) -> None:
    """Tokens one by one, and at once, across the window, where a full cache rolls, and in chunks that are not full."""
    emptied(engine)
    last = engine.slots - 1
    ids = random_ids(longest, graphs.record.model.vocab_size)
    expected = _logits(graphs, ids)
    for i, found in enumerate(stepwise(engine, 0, ids)):
        assert reference.difference(found[None], expected[i][None]) <= bound, i
    for length in (1, window, longest):
        engine.rewind(last, 0)
        found = engine.feed(last, ids[:length])
        assert reference.difference(found[None], expected[length - 1][None]) <= bound, length


def check_rows_of_all_slots(graphs: OnnxGraphs, engine: Engine, longest: int, bound: float) -> None:
    """Each slot's text is its own, of another length; rows come in random order, some of them drafts."""
    emptied(engine)
    rng = np.random.default_rng(1)
    texts = [random_ids(longest, graphs.record.model.vocab_size, seed) for seed in range(engine.slots)]
    expected = [_logits(graphs, text) for text in texts]
    for slot, text in enumerate(texts):
        engine.prefill(slot, text[: 2 + slot])
    while rows := _next_rows(engine, texts, rng):
        at = [len(engine.tokens(slot)) + [row.slot for row in rows[:i]].count(slot) for i, (slot, _) in enumerate(rows)]
        for found, row, position in zip(engine.step(rows), rows, at, strict=True):
            assert reference.difference(found[None], expected[row.slot][position][None]) <= bound, row


def _logits(graphs: OnnxGraphs, ids: Sequence[int]) -> np.ndarray:
    """Logits (tokens, vocab) after each token."""
    theirs = onnx_shifted(graphs)
    return np.concatenate([theirs.step(np.array([[token_id]]), np.array([i])) for i, token_id in enumerate(ids)])


def _next_rows(engine: Engine, texts: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Row]:
    """As many rows as a step may have, or fewer: of each slot the next tokens of its text."""
    left = [slot for slot, text in enumerate(texts) for _ in range(len(text) - len(engine.tokens(slot)))]
    slots = rng.permutation(left)[: rng.integers(1, engine.step_rows[-1] + 1)].tolist()
    ahead = [iter(text[len(engine.tokens(slot)) :]) for slot, text in enumerate(texts)]
    return [Row(slot, next(ahead[slot])) for slot in slots]
