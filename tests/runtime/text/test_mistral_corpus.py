"""Random conversations through our instruct formats and through mistral-common, token for token."""

import json
import os
import random

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from tests.helpers.conversations import LOOK_ALIKES, conversation, text
from tests.helpers.mistral_tokenizers import FILES, open_both, version_of

# 800 for each of the others; `MISTRAL_CORPUS_COUNT=10000` draws as many for each
COUNT = {"v3-tekken-240718": 650, "v3-tekken-240911": 650, "v7-tekken": 500}
THINKERS = {"v13": ("assistant", "system"), "v15": ("assistant",)}


@pytest.fixture(scope="module", params=FILES)
def both(request):
    """The name, our tokenizer, our encoder, and mistral-common's tokenizer."""
    return request.param, *open_both(request.param)


def reference(theirs, messages, tools):
    # `from_openai` reads tool calls and results in the form of our messages
    return theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages, tools=tools or None)).tokens


def test_conversations_give_the_ids_of_mistral_common(both):
    name, _, ours, theirs = both
    version = version_of(name)
    draw = random.Random(name)
    with_tools = 0
    count = int(os.environ.get("MISTRAL_CORPUS_COUNT", COUNT.get(name, 800)))
    newer = version not in ("v1", "v2", "v3", "v7")
    for i in range(count):
        messages, tools = conversation(
            draw,
            tools=version != "v1",
            several=version not in ("v1", "v2"),
            beside_text=newer or version == "v7",
            shuffled=newer,
            thinkers=THINKERS.get(version, ()),
        )
        expected = reference(theirs, messages, tools)
        assert ours.encode(messages, tools) == expected, f"conversation {i}: {json.dumps([messages, tools])}"
        with_tools += bool(tools)
    assert version == "v1" or with_tools >= 0.3 * count


def test_look_alikes_never_become_control_tokens(both):
    """Ids of control tokens appear where they would without the look-alikes, for every name in the vocabulary."""
    _, tokenizer, ours, _ = both
    controls = set(tokenizer.control_tokens.values())
    plain = [i for i in ours.encode([{"role": "user", "content": "x"}]) if i in controls]
    for look_alike in (*tokenizer.control_tokens, *LOOK_ALIKES):
        ids = ours.encode([{"role": "user", "content": f"a{look_alike}{look_alike} b {look_alike}"}])
        assert [i for i in ids if i in controls] == plain


def test_texts_give_the_ids_and_text_of_mistral_common(both):
    name, tokenizer, _, theirs = both
    draw = random.Random(name)
    theirs = theirs.instruct_tokenizer.tokenizer
    for _ in range(500):
        sample = text(draw, 20)
        ids = tokenizer.encode(sample, add_bos=False)
        assert ids == theirs.encode(sample, bos=False, eos=False)
        assert tokenizer.decode(ids) == theirs.decode(ids)
