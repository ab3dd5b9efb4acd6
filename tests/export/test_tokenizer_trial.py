"""A checkpoint's tokenizer and template are tried before anything takes time, in a process with limits."""

import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from export import tokenizer_trial
from export.checkpoints.checkpoint import open_checkpoint
from export.stage import ROOT
from export.tokenizer_trial import try_tokenizer
from export.weights.storing import record_of, write_tokenizer
from runtime.artifact.manifest import Quantization
from runtime.errors import UserError
from tests.helpers.tiny import write_tiny_mistral


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial") / "tiny"
    write_tiny_mistral(folder)
    return folder


def tried(tiny, tmp_path, template):
    folder = shutil.copytree(tiny, tmp_path / "copy", dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    checkpoint = open_checkpoint(folder, "auto", {})
    record = record_of(checkpoint, Quantization(scheme="none"), "fp32", {})
    stored = tmp_path / "stored"
    stored.mkdir(exist_ok=True)
    write_tokenizer(checkpoint, record, stored)
    try_tokenizer(record, stored, folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_a_template_that_writes_some_conversation_passes(tiny, tmp_path, template):
    tried(tiny, tmp_path, template)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "the chat template writes nothing"),
        ("{% for m in messages %}", "is not a valid jinja template: Unexpected end of template"),
        ("{{ raise_exception('never') }}", "cannot render this conversation: never"),
        ("{{ 9**(9**9) }}", "it computes a whole number of"),
    ],
)
def test_a_template_that_writes_none_is_refused(tiny, tmp_path, template, said):
    with pytest.raises(UserError, match="copy fails on one short message: ") as told:
        tried(tiny, tmp_path, template)
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; time.sleep(60)", "it takes longer than 3 seconds"),
        ("import os; os.abort()", "it ended with status -6"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); bytearray(2**34)",
            "not enough memory",
        ),
    ],
)
def test_a_process_that_hangs_crashes_or_takes_all_memory(tiny, tmp_path, monkeypatch, code, said):
    (tmp_path / "hostile.py").write_text(
        f"from runtime.errors import run_command\ndef main():\n    {code}\n    return 0\nrun_command(main)\n"
    )
    monkeypatch.setattr(tokenizer_trial, "MODULE", "hostile")
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 3)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=said):
        tried(tiny, tmp_path, "{{ messages[0].content }}")


def test_a_process_limits_itself_and_respects_stricter_limits():
    code = (
        "import resource; from runtime.text.process_limits import limit_process; "
        "resource.setrlimit(resource.RLIMIT_CPU, (50, 50)); limit_process(60, 2**33); "
        "print(resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_AS))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "(50, 50) (8589934592, 8589934592)\n"


@pytest.mark.parametrize("template", ["<|im_start|>{{ messages[0].content }}", "{{ messages[0].content }}<|im_start|>"])
def test_a_template_that_writes_a_token_that_the_model_lacks_is_refused(tiny, tmp_path, template):
    folder = shutil.copytree(tiny, tmp_path / "longer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = open_checkpoint(folder, "auto", {}).model.vocab_size
    fillers = [f"<filler {i}>" for i in range(size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([*fillers, "<|im_start|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        UserError, match=rf"the token <\|im_start\|> with the id {size}, but the model has {size} tokens"
    ):
        tried(folder, tmp_path, template)
    tried(folder, tmp_path, "{{ messages[0].content }}")  # a token that nothing writes may be anywhere


def test_nobody_chats_with_a_classifier(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("{% for %}")
    checkpoint = open_checkpoint(folder, "auto", {}, head="embedding")
    record = record_of(checkpoint, Quantization(scheme="none"), "fp32", {})
    write_tokenizer(checkpoint, record, tmp_path)
    try_tokenizer(record, tmp_path, folder)
