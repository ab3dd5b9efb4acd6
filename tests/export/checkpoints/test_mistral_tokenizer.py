import importlib.resources
import json
import shutil
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.sentencepiece import get_spm_version

from export.checkpoints.mistral.tokenizer import find, mistral_tokenizer
from runtime.errors import UserError

DATA = Path(str(importlib.resources.files("mistral_common") / "data"))
V1, V3, V7 = (
    DATA / name
    for name in (
        "tokenizer.model.v1",
        "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7",
    )
)


def tekken(version):
    """A file that states its version and is too small to be converted."""
    config = {"pattern": ".", "default_vocab_size": 1, "default_num_special_tokens": 1, "version": version}
    return json.dumps({"config": config, "vocab": []})


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "tokenizer.model.v1",
        "tokenizer.model.v2",
        "tokenizer.model.v3",
        "tokenizer.model.v7",
        "tokenizer.model.v7m1",
    ],
)
def test_the_suffix_tells_the_version(tmp_path, name):
    shutil.copy(V7, tmp_path / name)
    found = find(tmp_path)
    assert found.version == get_spm_version(name)
    assert found.declared == (name != "tokenizer.model")


def test_the_highest_version_wins_and_tekken_over_all(tmp_path):
    shutil.copy(V1, tmp_path / "tokenizer.model")
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    (tmp_path / "tokenizer.model.vocab").write_text("no model")
    assert find(tmp_path).path.name == "tokenizer.model.v3"
    (tmp_path / "tekken.json").write_text(tekken("v3"))
    assert find(tmp_path).path.name == "tekken.json"
    assert find(tmp_path).version == "v3"


def test_a_sentencepiece_model_and_whether_it_chats(tmp_path):
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    chat, base = (mistral_tokenizer(tmp_path, instruct=instruct) for instruct in (True, False))
    assert (chat.kind, chat.data, chat.bos_id, chat.eos_ids, chat.add_bos) == (
        "sentencepiece",
        V3.read_bytes(),
        1,
        (2,),
        True,
    )
    assert (chat.instruct, chat.chat_template) == ("v3", None)
    assert chat.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (base.data, base.instruct, base.chat_template) == (chat.data, None, None)


def test_a_version_that_is_not_known_is_refused_only_for_chats(tmp_path):
    shutil.copy(V7, tmp_path / "tokenizer.model.v9")
    with pytest.raises(
        UserError, match=r"tokenizer.model.v9 is of version v9, whose chat format is not known; expected one of v1, v2"
    ):
        mistral_tokenizer(tmp_path, instruct=True)
    assert mistral_tokenizer(tmp_path, instruct=False).instruct is None


def test_no_tokenizer(tmp_path):
    assert mistral_tokenizer(tmp_path, instruct=True) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [("tokenizer.model.v3", "is not a SentencePiece model"), ("tekken.json", "is not a tekken tokenizer")],
)
def test_a_damaged_file_is_one_sentence(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(UserError, match=message):
        mistral_tokenizer(tmp_path, instruct=False)
