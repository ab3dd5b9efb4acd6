"""What a user says of a model's conversations, for every format of checkpoint."""

import importlib.resources
import shutil
from pathlib import Path

import pytest

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.tokenizers.chat import Chat
from runtime.errors import UserError
from tests.helpers.raw_mistral import PARAMS, raw_tensors, write_raw
from tests.helpers.tiny import write_tiny_mistral

V3 = Path(str(importlib.resources.files("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"))
GIVEN = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_template_for_a_folder_in_mistrals_own_format(tmp_path):
    write_raw(tmp_path, PARAMS, raw_tensors(PARAMS))
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    plain = open_checkpoint(tmp_path, "auto", {}).tokenizer
    assert (plain.chat_template, plain.instruct) == (None, None)
    given = open_checkpoint(tmp_path, "auto", {}, chat=Chat(template=GIVEN)).tokenizer
    assert (given.chat_template, given.instruct) == (GIVEN, None)
    assert given.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_template_without_a_tokenizer(tmp_path):
    write_raw(tmp_path, PARAMS, raw_tensors(PARAMS))
    with pytest.raises(UserError, match=r"frontend.chat_template is set, but .* has no tokenizer that could use it"):
        open_checkpoint(tmp_path, "auto", {}, chat=Chat(template=GIVEN))


def test_a_gguf_has_no_format_of_its_tokenizers_own(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"x.gguf is of the type gguf, which has a chat template for that"):
        open_checkpoint(tmp_path / "x.gguf", "auto", {}, chat=Chat(instruct=True))


def test_the_user_is_warned_of_tokens_that_the_tokenizer_lacks(tmp_path):
    write_tiny_mistral(tmp_path / "tiny")
    assert open_checkpoint(tmp_path / "tiny", "auto", {}).notes == ()
    noted = open_checkpoint(tmp_path / "tiny", "auto", {}, chat=Chat(template="<|user|>" + GIVEN)).notes
    assert len(noted) == 1
    assert "writes <|user|>, which its tokenizer has no token for" in noted[0]
