import random

import pytest
from mistral_common.protocol.fim.request import FIMRequest

from runtime.errors import UserError
from runtime.text.fill_in_the_middle import encode_fill_in
from tests.helpers.conversations import text
from tests.helpers.mistral_tokenizers import open_both


@pytest.mark.parametrize("name", ["v3", "v7", "v3-tekken-240911", "v13-tekken"])
def test_prompts_give_the_ids_of_mistral_common(name):
    ours, _, theirs = open_both(name)
    draw = random.Random(name)
    cases = [("def f(", "return x"), ("", ""), ("a", ""), ("", " b"), ("a\n", "☺"), ("[SUFFIX]", "[PREFIX]")]
    for prefix, suffix in cases + [(text(draw), text(draw)) for _ in range(300)]:
        expected = theirs.encode_fim(FIMRequest(prompt=prefix, suffix=suffix)).tokens
        assert encode_fill_in(ours, prefix, suffix) == expected, (prefix, suffix)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_tokenizer_without_the_tokens_is_refused_by_name(name):
    ours, _, _ = open_both(name)
    with pytest.raises(UserError, match=r"the tokenizer has no token \[SUFFIX\], which --suffix needs"):
        encode_fill_in(ours, "a", "b")
