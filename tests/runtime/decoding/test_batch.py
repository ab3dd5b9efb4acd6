"""Batched generation on compiled artifacts.

A row's tokens are compared beside any other rows, and with transformers on the prompt alone.

Rows of one length give the same bits whatever the others hold. Rows of different lengths are padded to the longest,
which shifts the steps in which a prompt's keys are summed: then the order of rounding differs, and logits agree within
the bound for two orders of summation.
"""

import json

import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from runtime import generate
from runtime.decoding.batch import generate_batch
from runtime.decoding.generation import row_samplers
from runtime.decoding.options import SamplingOptions
from runtime.engines.engine import Engine
from runtime.errors import UserError
from tests.helpers import reference
from tests.helpers.artifacts import CACHE_LEN, WINDOW, random_ids
from tests.helpers.artifacts import bound as artifacts_bound

GREEDY = SamplingOptions()
STEPS = 3 * WINDOW  # past the window, from any prompt
# below, at and beyond the window and both prefill chunks
LENGTHS = (1, 2, 4, 5, WINDOW - 1, WINDOW, WINDOW + 1, 16, 2 * WINDOW + 3)


class Recording:
    """An engine that keeps the logits of every call."""

    def __init__(self, engine):
        self.engine = engine
        self.batch, self.room, self.reset = engine.batch, engine.room, engine.reset
        self.calls = []

    def prefill(self, prompts):
        self.calls.append(self.engine.prefill(prompts))
        return self.calls[-1]

    def step(self, tokens, ids, first):
        self.calls.append(self.engine.step(tokens, ids, first))
        return self.calls[-1]


def run(engine, prompts, options=GREEDY, samplers=None, **limits):
    """Steps of each prompt."""
    limits = {"max_tokens": STEPS, "eos_ids": (), **limits}
    made = [[] for _ in prompts]
    for index, step in generate_batch(engine, prompts, samplers or row_samplers(options, len(prompts)), **limits):
        made[index].append(step)
    return made


def ids_of(steps):
    return [step.token_id for step in steps]


def row_bits(engine, prompts, row, **limits):
    """Logits (steps, vocab) from which one row's ids were drawn, and the ids."""
    recording = Recording(engine)
    steps = run(recording, prompts, **limits)[row]
    return np.array([logits[row] for logits in recording.calls[: len(steps)]]), ids_of(steps)


def prompt(length, seed, vocab=301):
    return random_ids(length, vocab, seed)


@pytest.fixture(scope="module")
def windowed(compile_case):
    return Engine.open(compile_case("batched").artifact, threads=2)


@pytest.fixture(scope="module")
def full_attention(compile_case):
    return Engine.open(compile_case("int8").artifact, threads=2)


@pytest.fixture(scope="module")
def bound(compile_case):
    return artifacts_bound(compile_case("batched").graphs)


def check(found, expected, bound, *, same_bits):
    """Compare the logits of a row beside others with those of the row alone."""
    if same_bits:
        assert np.array_equal(found, expected)
    else:
        assert reference.difference(found, expected) <= bound


@pytest.mark.parametrize("length", LENGTHS)
def test_a_row_gives_the_same_tokens_whatever_the_others_hold(windowed, bound, length):
    """The others hold the same text, another with the same padding, nothing, or texts that change the chunks.

    The model is float32.
    """
    target = prompt(length, 1)
    expected, ids = row_bits(windowed, [target], 0)
    assert expected.shape == (STEPS, windowed.manifest.model.vocab_size)
    beside = [
        (target, target),
        (prompt(length, 2), prompt(length, 3)),
        ([0], prompt(length, 4)),
        (prompt(1, 5), prompt(33, 6)),
    ]
    beside += [(prompt(17, 7), prompt(18, 8)), (prompt(30, 9), [0] * 3)]
    for one, two in beside:
        for row in range(3):
            prompts = [one, two]
            prompts.insert(row, target)
            found, found_ids = row_bits(windowed, prompts, row)
            assert found_ids == ids
            check(found, expected, bound, same_bits=len(one) == len(two) == length)


@pytest.mark.parametrize("length", [1, 4, 5, 11, 30])
def test_so_does_a_row_of_an_int8_artifact_without_a_window(full_attention, compile_case, length):
    bound = artifacts_bound(compile_case("int8").graphs)
    target = prompt(length, 1)
    expected, _ = row_bits(full_attention, [target], 0, max_tokens=10)
    for other in (target, prompt(length, 2), prompt(1, 3), prompt(13, 4), prompt(CACHE_LEN, 5)):
        for row, prompts in enumerate(([target, other], [other, target])):
            found, _ = row_bits(full_attention, prompts, row, max_tokens=10)
            check(found, expected, bound, same_bits=len(other) == length)


def test_others_that_end_early_change_nothing(windowed, bound):
    """The others draw ends of sequence and the target does not: they continue, hidden, while the target goes on."""
    target, *others = (prompt(length, length) for length in (9, 3, 14))
    expected, ids = row_bits(windowed, [target], 0)
    early = [next(token for token in ids_of(run(windowed, [other])[0]) if token not in ids) for other in others]
    made = run(windowed, [others[0], target, others[1]], eos_ids=early)
    assert [steps[-1].finish_reason for steps in made] == ["stop", "length", "stop"]
    assert max(len(made[0]), len(made[2])) < STEPS
    found, found_ids = row_bits(windowed, [others[0], target, others[1]], 1, eos_ids=early)
    assert found_ids == ids
    check(found, expected, bound, same_bits=False)


def test_a_row_that_has_ended_leaves_its_caches_alone(full_attention):
    steps = generate_batch(
        full_attention, [prompt(CACHE_LEN - 2, 1), prompt(3, 2)], row_samplers(GREEDY, 2), max_tokens=20, eos_ids=()
    )
    ended = None
    for index, step in steps:
        if ended is not None and index == 1:
            assert all(np.array_equal(cache[0], old) for cache, old in zip(full_attention.caches, ended, strict=True))
        if index == 0 and step.finish_reason is not None:
            ended = [cache[0].copy() for cache in full_attention.caches]
    assert ended is not None


@pytest.fixture(scope="module")
def theirs(compile_case):
    """Greedy ids of transformers on one prompt alone."""
    model = MistralForCausalLM.from_pretrained(
        compile_case("batched").folder / "checkpoint", dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None

    def answer(ids):
        given = torch.tensor([ids])
        made = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=STEPS, do_sample=False, pad_token_id=0
        )
        return made[0, len(ids) :].tolist()

    return answer


def test_tokens_are_those_of_transformers_on_each_prompt_alone(windowed, theirs):
    """Nine prompts of different lengths on three rows, then two prompts on three rows, all past the window."""
    prompts = [prompt(length, length) for length in LENGTHS]
    expected = [theirs(ids) for ids in prompts]
    assert [ids_of(steps) for steps in run(windowed, prompts)] == expected
    assert [ids_of(steps) for steps in run(windowed, prompts[-2:])] == expected[-2:]


def test_each_row_draws_with_its_own_sampler(windowed):
    options = SamplingOptions(temperature=1.0, top_p=0.9, seed=5)
    prompts = [prompt(length, length) for length in (4, 4, 11, 2)]
    made = run(windowed, prompts, options)
    for i, ids in enumerate(prompts):
        alone = run(windowed, [ids], samplers=[row_samplers(options, len(prompts))[i]])[0]
        assert made[i] == alone
    same = run(windowed, [prompts[0]] * 3, options)
    assert len({tuple(ids_of(steps)) for steps in same}) == 3


@pytest.mark.parametrize(("length", "count"), [(CACHE_LEN, 1), (CACHE_LEN - 3, 4)])
def test_a_row_that_is_full_ends_with_length_and_the_other_goes_on(full_attention, length, count):
    short = prompt(2, 2)
    full, other = run(full_attention, [prompt(length, 1), short], max_tokens=20)
    assert [step.finish_reason for step in full] == [None] * (count - 1) + ["length"]
    assert other == run(full_attention, [short], max_tokens=20)[0]
    assert len(other) == 20
    (to_the_end,) = run(full_attention, [short], max_tokens=100)
    assert len(to_the_end) == CACHE_LEN - len(short) + 1
    assert to_the_end[-1].finish_reason == "length"


def test_what_cannot_run_is_refused_before_anything_runs(full_attention):
    good = prompt(3, 1)
    for prompts, limits, message in [
        ([good, good, prompt(CACHE_LEN + 1, 2)], {}, "prompt 3 has 41 tokens, expected at most 40"),
        ([good, []], {}, "prompt 2 has no tokens"),
        ([good], {"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
    ]:
        recording = Recording(full_attention)
        with pytest.raises(UserError, match=message):
            run(recording, prompts, **limits)
        assert recording.calls == []


def test_the_engine_is_empty_afterwards_and_when_left_early(windowed):
    run(windowed, [prompt(3, 1)])
    assert windowed.position == 0
    steps = generate_batch(windowed, [prompt(3, 1)], row_samplers(GREEDY, 1), max_tokens=5, eos_ids=())
    next(steps)
    assert windowed.position == 3
    steps.close()
    assert windowed.position == 0


PROMPTS = ("This is a test", "x", "The quick brown fox jumps", "Another")


def command(capsys, artifact, *flags):
    assert generate.main([str(artifact), "--max-tokens", "12", *flags]) == 0
    return capsys.readouterr().out


def test_the_command_gives_each_prompt_what_it_gives_alone(compile_case, capsys):
    """Four prompts on three rows: as JSON objects, and as the same texts under headings."""
    artifact = compile_case("batched").artifact
    flags = [part for text in PROMPTS for part in ("--prompt", text)]
    found = json.loads(command(capsys, artifact, *flags, "--json"))
    alone = [json.loads(command(capsys, artifact, "--prompt", text, "--json")) for text in PROMPTS]
    for each in (*found, *alone):
        assert all(seconds > 0 for seconds in each.pop("timings").values())
    assert found == alone
    texts = [each["text"] for each in found]
    assert len(set(texts)) == len(texts)
    expected = "\n".join(f"> {text}\n{made}\n" for text, made in zip(PROMPTS, texts, strict=True))
    assert command(capsys, artifact, *flags) == expected


def test_the_command_ends_each_row_at_its_own_stop_string(compile_case, capsys):
    artifact = compile_case("batched").artifact
    flags = [part for text in PROMPTS[:3] for part in ("--prompt", text)]
    whole = [each["text"] for each in json.loads(command(capsys, artifact, *flags, "--json"))]
    stop = next(c for c in whole[0] if 0 < whole[0].find(c) < len(whole[0]) - 1 and c not in whole[1])
    found = json.loads(command(capsys, artifact, *flags, "--json", "--stop", stop))
    assert [each["text"] for each in found] == [text.partition(stop)[0] for text in whole]
    assert [each["finish_reason"] for each in found][:2] == ["stop", "length"]
    assert len(found[0]["token_ids"]) < len(found[1]["token_ids"]) == 12
