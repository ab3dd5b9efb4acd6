"""StaticModel against `transformers` on the same weights.

The numpy reference takes its place where transformers has no such model.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from export.checkpoints.checkpoint import open_checkpoint
from export.static_model.model import StaticModel
from runtime.artifact.manifest import ModelConfig
from tests.helpers import reference
from tests.helpers.artifacts import WINDOW, random_ids, static_model, torch_shifted
from tests.helpers.tiny import write_tiny_mistral

LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
LONGEST = max(LENGTHS)
CACHE_LEN = 24  # for models without a window: LONGEST fits
MODELS = {
    "windowed": {"sliding_window": WINDOW},
    "full-attention": {"sliding_window": None},
    "tied-head": {"sliding_window": WINDOW, "tie_word_embeddings": True},
    "other-head-dim": {"sliding_window": WINDOW, "head_dim": 24},
    "group-1": {"sliding_window": WINDOW, "num_key_value_heads": 4},
    "group-4": {"sliding_window": WINDOW, "num_key_value_heads": 1},
    "other-theta-and-eps": {"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 0.1},
}


@dataclass(frozen=True)
class Pair:
    ours: StaticModel
    theirs: MistralForCausalLM
    expected: np.ndarray  # their logits (LONGEST, vocab) after each token of `ids`, from one call without a cache
    weights: dict[str, np.ndarray]

    @property
    def config(self) -> ModelConfig:
        return self.ours.config

    @property
    def ids(self) -> list[int]:
        return random_ids(LONGEST, self.config.vocab_size)

    @property
    def bound(self) -> float:
        return reference.bound(self.config, LONGEST)


def load_pair(folder: Path, changes: dict) -> Pair:
    write_tiny_mistral(folder, **changes)
    checkpoint = open_checkpoint(folder, "huggingface", {})
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    ours = static_model(checkpoint.model, checkpoint.model.cache_lens(CACHE_LEN), weights)
    theirs = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return Pair(ours, theirs, their_logits(theirs, random_ids(LONGEST, checkpoint.model.vocab_size)), weights)


@torch.no_grad()
def their_logits(model: MistralForCausalLM, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    return load_pair(tmp_path_factory.mktemp("model") / "checkpoint", MODELS[request.param])


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return load_pair(tmp_path_factory.mktemp("model") / "checkpoint", MODELS["windowed"])


def chunks_of(length: int, chunk: int) -> list[int]:
    return [chunk] * -(-length // chunk)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_prefill(pair, length):
    found = torch_shifted(pair.ours, 1).feed([pair.ids[:length]], [length])
    assert reference.difference(found[0], pair.expected[length - 1]) <= pair.bound


@pytest.mark.parametrize("chunk", [2, 5, 11])  # 11 is longer than the window
def test_chunked_prefill_padded_on_the_left(pair, chunk):
    for length in LENGTHS:
        found = torch_shifted(pair.ours, 1).feed([pair.ids[:length]], chunks_of(length, chunk))
        assert reference.difference(found[0], pair.expected[length - 1]) <= pair.bound, length


def test_token_by_token(pair):
    model = torch_shifted(pair.ours, 1)
    for i, token in enumerate(pair.ids):
        found = model.step(np.array([[token]]), np.array([i]))
        assert reference.difference(found[0], pair.expected[i]) <= pair.bound, i


def test_prefill_then_decode(pair):
    model = torch_shifted(pair.ours, 1)
    model.feed([pair.ids[:WINDOW]], chunks_of(WINDOW, 5))
    for i in range(WINDOW, LONGEST):
        found = model.step(np.array([[pair.ids[i]]]), np.array([i]))
        assert reference.difference(found[0], pair.expected[i]) <= pair.bound, i


def test_the_window_matters(windowed):
    """So the comparisons above would notice a window that is lost or off by one."""
    for window in (WINDOW - 1, WINDOW + 1, None):
        other = msgspec.structs.replace(windowed.config, sliding_window=(window,) * windowed.config.n_layers)
        changed = reference.logits(other, windowed.weights, windowed.ids)
        assert reference.difference(changed[-1], windowed.expected[-1]) > 100 * windowed.bound


def test_rows_of_a_batch_are_padded_independently(windowed):
    """Rows of 19 and 6 tokens in chunks of 5 give the same as each row alone."""
    lengths = LONGEST, 6
    found = torch_shifted(windowed.ours, 2).feed([windowed.ids[:n] for n in lengths], chunks_of(LONGEST, 5))
    for row, length in enumerate(lengths):
        assert reference.difference(found[row], windowed.expected[length - 1]) <= windowed.bound


def test_a_row_gives_the_same_bits_whatever_the_other_holds(windowed):
    first = windowed.ids[:9]
    answers = [torch_shifted(windowed.ours, 2).feed([first, other], [5, 5])[0] for other in (windowed.ids[:2], [7] * 9)]
    assert np.array_equal(*answers)


def test_mixed_windows_match_the_reference(windowed):
    """Full attention in one layer and a window in the other, which transformers' Mistral does not have."""
    for windows in ((None, WINDOW), (WINDOW, None), (3, WINDOW)):
        config = msgspec.structs.replace(windowed.config, sliding_window=windows)
        module = static_model(config, config.cache_lens(CACHE_LEN), windowed.weights)
        expected = reference.logits(config, windowed.weights, windowed.ids)
        for sizes in ([LONGEST], chunks_of(LONGEST, 5), [1] * LONGEST):
            found = torch_shifted(module, 1).feed([windowed.ids], sizes)
            assert reference.difference(found[0], expected[-1]) <= windowed.bound, (windows, sizes)


def test_reference_matches_transformers_in_float64(pair):
    """The reference itself is compared, so that a comparison with it is one with transformers.

    transformers keeps rotary angles and norms in float32 even then: angles up to 19 radians have a relative rounding
    error of 2**-24, which is the float32 bound once more.
    """
    found = reference.logits(pair.config, pair.weights, pair.ids)
    expected = their_logits(pair.theirs.double(), pair.ids)
    pair.theirs.float()
    assert reference.difference(found, expected) <= pair.bound
