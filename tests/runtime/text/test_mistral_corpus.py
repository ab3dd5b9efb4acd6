"""10,000 random conversations through our instruct formats and through mistral-common, token for token."""

import importlib.resources
import json
import random
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from export.checkpoints.mistral_tokenizer import mistral_tokenizer
from runtime.artifact.manifest import TokenizerSpec
from runtime.text.conversation_encoder import open_conversation_encoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.conversations import LOOK_ALIKES, conversation, text

DATA = Path(str(importlib.resources.files("mistral_common") / "data"))
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v3-tekken-240718": "tekken_240718.json",
    "v3-tekken-240911": "tekken_240911.json",
    "v7-tekken": "tekken_240911.json",  # the library has no file of this version: a v3 file that says it is v7
}
# 1600 for each of the others: 10,000 in all
COUNT = {"v3-tekken-240718": 1300, "v3-tekken-240911": 1300, "v7-tekken": 1000}
SHARES = {"v1": 0, "v2": 0.3, "v3": 0.3, "v7": 0.3}  # of the conversations, at least, have tools


def write(name, folder):
    """The file under the name that it has in a checkpoint, so that both read its version from it."""
    source = DATA / FILES[name]
    if source.suffix != ".json":
        target = folder / f"tokenizer.model{source.suffix}"
        target.write_bytes(source.read_bytes())
        return target
    target = folder / "tekken.json"
    content = source.read_bytes()
    target.write_bytes(content.replace(b'"version": "v3"', b'"version": "v7"') if name == "v7-tekken" else content)
    return target


def open_ours(folder, artifact):
    source = mistral_tokenizer(folder, instruct=True)
    file = {"tokenizer.json": "tokenizer.json", "sentencepiece": "tokenizer.model"}[source.kind]
    (artifact / file).write_bytes(source.data)
    spec = TokenizerSpec(
        kind=source.kind,
        file=file,
        bos_id=source.bos_id,
        add_bos=source.add_bos,
        eos_ids=source.eos_ids,
        instruct=source.instruct,
    )
    tokenizer = open_tokenizer(spec, artifact)
    return tokenizer, open_conversation_encoder(spec, artifact, tokenizer)


@pytest.fixture(scope="module", params=FILES)
def both(request, tmp_path_factory):
    """The name, our tokenizer, our encoder, and mistral-common's tokenizer."""
    folder = tmp_path_factory.mktemp("raw")
    theirs = MistralTokenizer.from_file(write(request.param, folder))
    assert theirs.version == request.param.partition("-")[0]
    return request.param, *open_ours(folder, tmp_path_factory.mktemp("artifact")), theirs


def reference(theirs, messages, tools):
    # `from_openai` reads tool calls and results in the form of our messages
    return theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages, tools=tools or None)).tokens


def test_conversations_give_the_ids_of_mistral_common(both):
    name, _, ours, theirs = both
    version = name.partition("-")[0]
    draw = random.Random(name)
    with_tools = 0
    count = COUNT.get(name, 1600)
    for i in range(count):
        messages, tools = conversation(
            draw, tools=version != "v1", several=version not in ("v1", "v2"), beside_text=version == "v7"
        )
        expected = reference(theirs, messages, tools)
        assert ours.encode(messages, tools) == expected, f"conversation {i}: {json.dumps([messages, tools])}"
        with_tools += bool(tools)
    assert with_tools >= SHARES[version] * count


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
