"""Answers to the requests of lm-evaluation-harness, against whole passes of `transformers` and the harness's rules."""

import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from build.tools.lm_eval.__main__ import main, metrics_table
from build.tools.lm_eval.scoring import Generation, Scored, Scorer, rolling_windows
from runtime.artifact.manifest import TokenizerSpec
from runtime.decoding.options import SamplingOptions
from runtime.engines.engine import Engine
from runtime.errors import UserError
from runtime.text.tokenizer import Tokenizer, open_tokenizer
from tests.helpers.artifacts import bound

PAIRS = [
    ("The capital of France is", " Paris."),
    ("2 + 2 = ", "4"),  # the space belongs to what is scored
    ("", "a text of its own"),
    ("a context that is much longer than the window of eight tokens", "x"),
    ("ab", "cd"),
]
BOS = 1


@pytest.fixture(scope="module")
def case(compile_case):
    return compile_case("batched")


@pytest.fixture(scope="module")
def scorer(case):
    """Three rows side by side, so that the last group of five requests is not full."""
    engine = Engine.open(case.artifact)
    return Scorer(engine, open_tokenizer(engine.manifest.tokenizer, engine.folder))


@pytest.fixture(scope="module")
def model(case):
    return MistralForCausalLM.from_pretrained(case.folder / "checkpoint", dtype=torch.float32)


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def expected_score(model, before, scored):
    """The sum of the scored tokens' log-probabilities, and whether each is the likeliest, by one pass."""
    found = logits(model, [*before, *scored][:-1])[len(before) - 1 :]
    logs = torch.log_softmax(found, -1)
    total = float(logs[range(len(scored)), scored].sum())
    return total, found.argmax(-1).tolist() == scored, float(found.abs().max())


def tolerance(case, scored, largest):
    """A log-probability is off by at most twice as much as the logits, and a sum of them by that for each token."""
    return 2 * len(scored) * bound(case.graphs) * largest


def test_loglikelihood_is_that_of_transformers(case, scorer, model):
    for (context, continuation), (found, greedy) in zip(PAIRS, scorer.loglikelihood(PAIRS), strict=True):
        whole = [BOS, *(byte + 0 for byte in scorer.tokenizer.encode(context + continuation, add_bos=False))]
        kept = len(context.rstrip()) + 1  # bos, and a token for each byte
        total, same, largest = expected_score(model, whole[:kept], whole[kept:])
        assert found == pytest.approx(total, abs=tolerance(case, whole[kept:], largest))
        assert greedy == same


def test_a_greedy_continuation_is_found_greedy(scorer, model):
    """The token that transformers ranks first is greedy, any other is not."""
    ids = scorer.tokenizer.encode("The rays")
    best, *_, worst = logits(model, ids)[-1].argsort(descending=True).tolist()
    requests = [Scored(ids, [best]), Scored(ids, [worst]), Scored(ids, [])]
    assert [greedy for _, greedy in scorer.score(requests)] == [True, False, True]
    assert scorer.score(requests)[2] == (0.0, True)


def test_rolling_likelihood_is_of_the_whole_text(case, scorer, model):
    texts = ["abc abc abc", "a much longer text, beyond any window of eight tokens", ""]
    found = scorer.loglikelihood_rolling(texts)
    for text, value in zip(texts[:2], found, strict=False):
        ids = scorer.tokenizer.encode(text, add_bos=False)
        total, _, largest = expected_score(model, [BOS], ids)
        assert value == pytest.approx(total, abs=tolerance(case, ids, largest))
    assert found[2] == 0


def test_generation_is_greedy_and_stops(scorer, model):
    """What transformers ranks first, token by token, up to a stop string, which is left out."""
    ids = scorer.tokenizer.encode("The rays")
    written = []
    while len(written) < 12:
        written.append(int(logits(model, [*ids, *written])[-1].argmax()))
    text = scorer.tokenizer.stream(ids)
    whole = "".join(text.push(each) for each in written) + text.flush()
    settings = {"max_gen_toks": 12, "until": []}
    stop = whole[4:6]
    found = scorer.generate_until([("The rays", settings), ("The rays", {**settings, "until": stop})])
    assert found == [whole, whole[: whole.index(stop)]]


class Recorder:
    """Two slots of eight tokens each, whose logits follow from what a slot holds."""

    slots = 2
    step_rows = (1, 2)
    vocab = 320

    def __init__(self):
        self.held = [[], []]

    def room(self, slot):
        return 8 - len(self.held[slot])

    def rewind(self, slot, length):
        del self.held[slot][length:]

    def feed(self, slot, ids):
        assert 0 < len(ids) <= self.room(slot)
        self.held[slot] += ids
        return self.logits(self.held[slot])

    def step(self, rows):
        return np.stack([self.feed(row.slot, [row.token_id]) for row in rows])

    def logits(self, row):
        return np.random.default_rng(row).standard_normal(self.vocab).astype(np.float32)

    def log_probability(self, before, token_id):
        scores = self.logits(before).astype(np.float64)
        return float(scores[token_id] - np.log(np.exp(scores).sum()))


@pytest.fixture
def small(scorer):
    return Scorer(Recorder(), scorer.tokenizer)


def test_a_long_context_loses_its_beginning(small):
    """As many ids are fed as there are slots: all but the last one of context and continuation."""
    context, continuation = list(range(10, 30)), [40, 41, 42]
    (found,) = small.score([Scored(context, continuation)])
    kept = context[-6:]
    log = small.engine.log_probability
    assert found[0] == pytest.approx(log(kept, 40) + log([*kept, 40], 41) + log([*kept, 40, 41], 42))


def test_rows_of_different_lengths_do_not_disturb_each_other(small):
    requests = [Scored([10 + i], list(range(20, 20 + i))) for i in range(1, 7)]
    for request, (found, _) in zip(requests, small.score(requests), strict=True):
        ids = [*request.context, *request.continuation]
        assert found == pytest.approx(sum(small.engine.log_probability(ids[:i], ids[i]) for i in range(1, len(ids))))


def test_a_continuation_longer_than_the_caches_is_refused(small):
    with pytest.raises(UserError, match="a continuation has 9 tokens, expected at most the 8 slots"):
        small.score([Scored([5], list(range(9)))])


def test_windows_are_those_of_the_harness():
    """The example in the docstring of `LM.loglikelihood_rolling` in lm_eval/api/model.py."""
    windows = list(rolling_windows(range(10), prefix_id=99, slots=4))
    assert windows == [
        Scored([99], [0, 1, 2, 3]),
        Scored([3], [4, 5, 6, 7]),
        Scored([5, 6, 7], [8, 9]),
    ]
    assert list(rolling_windows(range(3), 99, None)) == [Scored([99], [0, 1, 2])]
    assert list(rolling_windows([], 99, None)) == []


def test_windows_score_each_id_once(small):
    text = "abcdefghijklm"
    ids = [BOS, *small.tokenizer.encode(text, add_bos=False)]
    before = [ids[:i] if i <= 8 else ids[5:i] for i in range(1, len(ids))]  # the second window holds ids 5 to 12
    expected = sum(small.engine.log_probability(each, ids[i]) for i, each in enumerate(before, 1))
    assert small.loglikelihood_rolling([text]) == [pytest.approx(expected)]


def test_writing_more_than_the_caches_hold_is_refused(small):
    with pytest.raises(UserError, match="the task writes up to 8 tokens, expected fewer than the 8 slots"):
        small.generate_until([("a", {"max_gen_toks": 8})])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Generation(256, SamplingOptions(), ())),
        ({"until": "\n", "max_gen_toks": 5}, Generation(5, SamplingOptions(), ("\n",))),
        ({"until": ["a", ""], "max_tokens": 6}, Generation(6, SamplingOptions(), ("a",))),
        ({"do_sample": False, "temperature": 0.7}, Generation(256, SamplingOptions(), ())),
        ({"do_sample": True}, Generation(256, SamplingOptions(temperature=1.0), ())),
        ({"temperature": 0.5, "top_k": 3}, Generation(256, SamplingOptions(temperature=0.5, top_k=3), ())),
    ],
)
def test_generation_settings_mean_what_they_mean_in_the_harness(settings, expected):
    assert Generation.of(settings) == expected


def test_an_unknown_generation_setting_is_refused():
    with pytest.raises(UserError, match=r"the task sets generation_kwargs\.num_beams, expected some of do_sample"):
        Generation.of({"num_beams": 4})


def test_a_text_without_context_needs_a_token_before_it(scorer):
    spec = TokenizerSpec("tokenizer.json", "tokenizer.json", None, False, ())
    bare = Scorer(scorer.engine, Tokenizer(spec, scorer.tokenizer._library))
    with pytest.raises(UserError, match="neither bos nor an end of text"):
        bare.loglikelihood([("", "a")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit is 0, expected at least 1"),
        (["--tasks-folder", "nowhere"], "--tasks-folder is nowhere, expected a folder"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, message, monkeypatch):
    monkeypatch.setattr("build.tools.lm_eval.__main__.importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=message):
        main(["nowhere", "--tasks", "x", *arguments])


def test_without_the_harness_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr("build.tools.lm_eval.__main__.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm_eval is not installed; install it with `make setup EVAL=1`"):
        main(["nowhere", "--tasks", "x"])


def test_metrics_are_tabulated():
    found = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.25, "words,none": 3, "words_stderr,none": "N/A"}
    table = metrics_table({"x": found})
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells == {
        "task": ["x", "x"],
        "metric": ["acc", "words"],
        "filter": ["none", "none"],
        "value": ["0.5000", "3"],
        "standard error": ["0.2500", ""],
    }
