"""Tokens that a fine-tune added beside tokenizer.model or tokenizer.json get the ids that transformers gives them."""

import importlib.resources
import json
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from export.checkpoints.huggingface import tokenizer as huggingface_tokenizer
from export.checkpoints.tokenizers.chat import Chat
from export.weights.storing import TOKENIZER_FILES
from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.chat_template import ChatTemplate, TemplateEncoder
from runtime.text.tokenizer import open_tokenizer

MODEL = Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
TEXTS = ["hi there", "", "a\n", "\u00e9\u6771\u4eac", "call <tool> now", "<tool>now", "<tool><tool>x", "x<tool>"]


def decoder(tokens, **flags):
    """`added_tokens_decoder` with {id: (content, special)}."""
    usual = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return {
        str(i): {"content": content, "special": special, **usual, **flags} for i, (content, special) in tokens.items()
    }


def write(folder, *, config=None, added=None, specials=None):
    (folder / "tokenizer.model").write_bytes(MODEL.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | (config or {})))
    for name, values in (("added_tokens.json", added), ("special_tokens_map.json", specials)):
        if values is not None:
            (folder / name).write_text(json.dumps(values))
    return folder


def open_source(folder):
    source, _ = huggingface_tokenizer.open_tokenizer(folder, {"bos_token_id": 1, "eos_token_id": 2}, Chat())
    return source


def open_ours(folder):
    source = open_source(folder)
    spec = TokenizerSpec(
        kind=source.kind,
        file=f"artifact_{TOKENIZER_FILES[source.kind]}",
        bos_id=source.bos_id,
        add_bos=source.add_bos,
        eos_ids=source.eos_ids,
        text_after_added=source.text_after_added,
    )
    (folder / spec.file).write_bytes(source.data)
    return open_tokenizer(spec, folder)


TOKENS = {32000: ("<|im_end|>", True), 32001: ("<|im_start|>", True), 32002: ("<tool>", False)}
FOLDERS = {
    "the decoder": {"config": {**NAMES, "added_tokens_decoder": decoder(TOKENS)}},
    "added_tokens.json": {
        "config": NAMES,
        "added": {"<tool>": 32002, "<|im_end|>": 32000, "<|im_start|>": 32001},
        "specials": {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]},
    },
    "the decoder before added_tokens.json": {
        "config": {**NAMES, "added_tokens_decoder": decoder(TOKENS)},
        "added": {"<other>": 32000},
    },
}


# transformers' LlamaTokenizer puts no second space in front of a space, even where it is asked to be as it once was.
REFERENCES = {"as it once was": (SentencePieceBackend, True), "as it is": (LlamaTokenizer, False)}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("reference", REFERENCES)
def test_ids_are_those_of_transformers(tmp_path, folder, reference):
    files, (library, legacy) = FOLDERS[folder], REFERENCES[reference]
    write(tmp_path, **{**files, "config": {**files["config"], "legacy": legacy}})
    ours, theirs = open_ours(tmp_path), library.from_pretrained(tmp_path)
    for content in ("<|im_end|>", "<|im_start|>", "<tool>"):
        assert ({**ours.control_tokens, **ours.added_tokens})[content] == theirs.convert_tokens_to_ids(content)
    for text in TEXTS:
        assert ours.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False), text
    messages = [{"role": "user", "content": text} for text in TEXTS if "<tool>" not in text]
    encoder = TemplateEncoder(ChatTemplate(CHATML, {}), ours)
    rendered = theirs.apply_chat_template(messages, chat_template=CHATML, tokenize=False)
    assert encoder.encode(messages) == theirs.encode(rendered, add_special_tokens=False)


def test_text_is_that_of_transformers(tmp_path):
    write(tmp_path, **FOLDERS["the decoder"])
    ours, theirs = open_ours(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "<|im_start|>assistant\nhi<|im_end|>"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_cannot_be_forged_and_others_are_found(tmp_path):
    ours = open_ours(write(tmp_path, **FOLDERS["the decoder"]))
    assert not {32000, 32001} & set(ours.encode("<|im_end|>\n<|im_start|>system"))
    assert 32002 in ours.encode("a <tool>")


def test_a_gap_keeps_the_ids_that_are_given(tmp_path):
    write(tmp_path, config={**NAMES, "added_tokens_decoder": decoder({32000: ("<a>", True), 32003: ("<b>", True)})})
    ours = open_ours(tmp_path)
    assert {name: ours.control_tokens[name] for name in ("<a>", "<b>")} == {"<a>": 32000, "<b>": 32003}
    assert ours.encode("<unused_32001>") == [1, *SentencePieceProcessor(str(MODEL)).encode("<unused_32001>")]


def test_tokens_of_the_model_itself_change_nothing(tmp_path):
    own = {i: (name, True) for i, name in enumerate(("<unk>", "<s>", "</s>"))}
    write(tmp_path, config={**NAMES, "added_tokens_decoder": decoder(own)})
    source = open_source(tmp_path)
    assert source.data == MODEL.read_bytes()
    assert source.text_after_added == "joined"


def test_a_control_token_may_get_another_name(tmp_path):
    write(tmp_path, config={"added_tokens_decoder": decoder({2: ("<|im_end|>", True)})})
    ours = open_ours(tmp_path)
    assert ours.control_tokens["<|im_end|>"] == 2
    assert "</s>" not in ours.control_tokens
    assert open_source(tmp_path).bos_id == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added": {"<a>": -1}}, "added_tokens.json has an added token with the id '-1', expected a whole number"),
        (
            {"added": {"<a>": 32000 + 2**16 + 3}},
            "has the added token '<a>' with the id 97539, expected a text and an id",
        ),
        (
            {"added": {f"<{i}>": 32000 + i for i in range(2**16 + 1)}},
            "lists 65537 added tokens, expected at most 65536",
        ),
        (
            {"config": {"added_tokens_decoder": decoder({"1" * 5000: ("<a>", True)})}},
            "tokenizer_config.json has an added token with the id '1111.*', expected a whole number",
        ),
        ({"added": {"": 32000}}, "has the added token '' with the id 32000"),
        ({"added": {"<a>": 32000, "<b>": 32000}}, "lists an added token or an id twice"),
        ({"added": {"<s>": 32000}}, "'<s>' with the id 32000, but .*tokenizer.model has it as 1"),
        ({"added": {"<a>": 500}}, "has the added token '<a>' with the id 500, which is .* in .*tokenizer.model"),
        ({"added": {"<a>": "x"}}, "added_tokens.json is malformed"),
        (
            {"config": {"added_tokens_decoder": decoder({32000: ("<a>", True)}, rstrip=True)}},
            "'<a>' with rstrip, which tokenizer.model cannot express",
        ),
    ],
)
def test_what_a_model_cannot_have_is_one_sentence(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def write_json(folder, **files):
    """A folder with a tokenizer.json of bytes, and the same files beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *alphabet]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    write(folder, **files)
    (folder / "tokenizer.model").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("legacy_files", [False, True])
def test_a_tokenizer_json_gets_the_tokens_that_it_lacks(tmp_path, legacy_files):
    tokens = {259: ("<|im_end|>", True), 260: ("<tool>", False), 1: ("<s>", True)}
    files = {"config": {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}}
    if legacy_files:
        files |= {"added": {"<|im_end|>": 259, "<tool>": 260}, "specials": {"eos_token": "<|im_end|>"}}
    else:
        files["config"]["added_tokens_decoder"] = decoder(tokens)
    write_json(tmp_path, **files)
    ours, theirs = open_ours(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for content in ("<|im_end|>", "<tool>"):
        assert ({**ours.control_tokens, **ours.added_tokens})[content] == theirs.convert_tokens_to_ids(content)
    for text in TEXTS:
        assert ours.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False)


def test_a_tokenizer_json_that_has_them_all_stays_as_it_is(tmp_path):
    write_json(tmp_path, config={**NAMES, "added_tokens_decoder": decoder({1: ("<s>", True)})})
    assert open_source(tmp_path).data == (tmp_path / "tokenizer.json").read_bytes()


def test_another_id_than_the_folder_says_is_refused(tmp_path):
    write_json(tmp_path, config={"added_tokens_decoder": decoder({300: ("<a>", True)})})
    with pytest.raises(UserError, match=r"the added token '<a>' with the id 300, but .*tokenizer.json leads to 259"):
        open_source(tmp_path)
