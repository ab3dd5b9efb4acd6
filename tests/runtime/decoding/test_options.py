import math

import pytest

from runtime import cli
from runtime.decoding.options import MOST_BIASES, SamplingOptions
from runtime.errors import UserError


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-3},  # would make large logits infinite
        {"repetition_penalty": 1e-320},
        {"repetition_penalty": 101.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"presence_penalty": 2.1},
        {"presence_penalty": math.nan},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": math.nan},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name} is .*, expected"):
        SamplingOptions(**wrong)


@pytest.mark.parametrize(
    ("biases", "sentence"),
    [
        ({3: 100.5}, "logit_bias of token 3 is 100.5, expected between -100 and 100"),
        ({3: math.nan}, "logit_bias of token 3 is nan, expected between -100 and 100"),
        ({-1: 1.0}, "logit_bias names the token id -1, expected at least 0"),
        (dict.fromkeys(range(MOST_BIASES + 1), 1.0), "logit_bias has 1025 entries, expected at most 1024"),
    ],
)
def test_biases_out_of_range_are_refused(biases, sentence):
    with pytest.raises(UserError, match=sentence):
        SamplingOptions(logit_bias=biases)


def test_the_limits_themselves_are_allowed():
    SamplingOptions(presence_penalty=-2, frequency_penalty=2, logit_bias=dict.fromkeys(range(MOST_BIASES), -100.0))


def test_a_bias_is_checked_against_the_vocabulary():
    options = SamplingOptions(logit_bias={9: 1.0, 3: 1.0})
    options.check_vocabulary(10)
    SamplingOptions().check_vocabulary(1)
    with pytest.raises(UserError, match="logit_bias names the token id 9, expected 0 to 8"):
        options.check_vocabulary(9)


def parsed(*flags):
    return cli.sampling_options(
        cli.model_parser("runtime.generate", "", max_tokens=1).parse_args(["artifact", *map(str, flags)])
    )


def test_flags_set_every_option():
    assert parsed() == SamplingOptions()
    flags = ("--temperature", 0.5, "--top-k", 3, "--top-p", 0.9, "--min-p", 0.1, "--repetition-penalty", 1.2)
    more = ("--seed", 7, "--presence-penalty", -0.5, "--frequency-penalty", 0.25)
    biases = ("--logit-bias", "5:-100", "--logit-bias", "17:2.5")
    assert parsed(*flags, *more, *biases) == SamplingOptions(0.5, 3, 0.9, 0.1, 1.2, 7, -0.5, 0.25, {5: -100, 17: 2.5})


@pytest.mark.parametrize("given", ["5", "five:1", "5:", "5:much"])
def test_a_bias_that_is_no_pair_is_refused(given):
    with pytest.raises(UserError, match=f"--logit-bias is {given}, expected a token id and a number, such as 42:-5"):
        parsed("--logit-bias", given)
