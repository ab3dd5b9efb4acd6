"""The real model at fp32: its greedy tokens equal those of transformers with the same weights."""

import pytest

from export.calibration.fixed_text import OPTICKS
from runtime.decoding.options import SamplingOptions
from runtime.engines.engine import Engine
from runtime.scheduling.completions import completions
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.smollm2 import greedy, smollm2, transformers_model

pytestmark = pytest.mark.slow

NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first",
    "My favourite recipe begins with two eggs and",
    "Question: What is 12 times 12? Answer:",
    "Das Wetter ist heute",
)
LONG_TOKENS = 450
WINDOWED_LENGTHS = (63, 64, 65, 131, 300)


class Model:
    """A variant's artifact, opened, and `transformers` with the same windows."""

    def __init__(self, name, shared):
        self.artifact = smollm2(name, shared)
        self.engine = Engine.open(self.artifact)
        self.tokenizer = open_tokenizer(self.engine.manifest.tokenizer, self.artifact)
        self.reference = transformers_model(name, shared)

    def long_text(self, tokens):
        ids = self.tokenizer.encode(OPTICKS.open().content)
        assert len(ids) >= tokens
        return ids[:tokens]

    def answers(self, prompts):
        """Of as many prompts at a time as there are slots."""
        found = [[] for _ in prompts]
        for i, step in completions(self.engine, prompts, SamplingOptions(), max_tokens=NEW_TOKENS, eos_ids=()):
            found[i].append(step.token_id)
        assert [len(answer) for answer in found] == [NEW_TOKENS] * len(prompts)
        return found


@pytest.fixture(scope="module")
def fp32(shared_folder):
    return Model("fp32", shared_folder / "smollm2")


@pytest.fixture(scope="module")
def windowed(shared_folder):
    return Model("windowed", shared_folder / "smollm2")


def test_greedy_tokens_equal_transformers_on_ten_prompts(fp32):
    prompts = [*(fp32.tokenizer.encode(text) for text in PROMPTS), fp32.long_text(LONG_TOKENS)]
    assert len(prompts) == 10
    found = fp32.answers(prompts)
    assert found == [greedy(fp32.reference, ids, answer) for ids, answer in zip(prompts, found, strict=True)]
    assert "Paris" in fp32.tokenizer.decode(found[0])


def test_greedy_tokens_equal_transformers_across_the_window(windowed):
    prompts = [windowed.long_text(n) for n in WINDOWED_LENGTHS]
    found = windowed.answers(prompts)
    assert found == [greedy(windowed.reference, ids, answer) for ids, answer in zip(prompts, found, strict=True)]
