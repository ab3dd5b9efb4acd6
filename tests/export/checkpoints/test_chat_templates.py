"""The chat templates of a folder, in every form in which they are published, against transformers."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from export.checkpoints.location import checkpoint_files
from export.checkpoints.tokenizers.chat_templates import folder_template
from runtime.errors import UserError
from runtime.text.chat_template import ChatTemplate

DEFAULT = "\n{% for m in messages %}\n  [{{ m.content }}]\n  {% endfor %}\n\n"
WITH_TOOLS = (
    "  {%- macro f(x) %}({{ x }}){% endmacro %}\n{{ f(tools[0].function.name) }}\n {% if true %}\n.{% endif %}\n"
)
LIST = [{"name": "tool_use", "template": WITH_TOOLS}, {"name": "default", "template": DEFAULT}]
MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]


@pytest.fixture
def folder(tmp_path):
    """Writes a folder with a tokenizer and the files that are given, JSON from whatever is no text."""

    def write(**files):
        config = {"model_type": "mistral"}
        for name, content in {"config.json": config, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return write


def in_config(template):
    return {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}}


@pytest.mark.parametrize(
    "files",
    [
        in_config(DEFAULT),
        in_config(LIST),
        in_config({"default": DEFAULT, "tool_use": WITH_TOOLS}),
        in_config("another") | {"chat_template.jinja": DEFAULT},
        {"chat_template.jinja": DEFAULT, "additional_chat_templates/tool_use.jinja": WITH_TOOLS},
    ],
    ids=["one", "list", "object", "file", "files"],
)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["without", "with"])
def test_a_folder_writes_what_transformers_writes(folder, files, tools):
    path = folder(**files)
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(
        MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True
    )
    template, notes = folder_template(path)
    assert (ChatTemplate(template, {}).render(MESSAGES, tools=tools or ()), notes) == (theirs, ())


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_counts_if_there_is_no_other(folder, name):
    assert folder_template(folder(**{name: {"chat_template": DEFAULT}}))[0] == DEFAULT
    assert folder_template(folder(**in_config("T")))[0] == "T"


@pytest.mark.parametrize(
    "files",
    [
        in_config([{"name": "rag", "template": "T"}, {"name": "tool_use", "template": "T"}]),
        {"additional_chat_templates/rag.jinja": "T", "additional_chat_templates/tool_use.jinja": "T"},
    ],
)
def test_templates_of_which_none_applies_are_noted(folder, files):
    template, notes = folder_template(folder(**files))
    assert template is None
    assert "has chat templates of the names rag, tool_use, and none of the name default" in notes[0]


def test_a_folder_without_templates(folder):
    assert folder_template(folder()) == folder_template(folder(**in_config(None))) == (None, ())


def test_a_malformed_template_is_refused(folder):
    with pytest.raises(UserError, match=r"tokenizer_config\.json is malformed: .*chat_template"):
        folder_template(folder(**in_config([{"name": "default"}])))


def test_every_file_with_a_template_counts_as_a_file_of_the_checkpoint(folder):
    path = folder(**{"additional_chat_templates/tool_use.jinja": "T", "additional_chat_templates/other.txt": "T"})
    assert path / "additional_chat_templates" / "tool_use.jinja" in checkpoint_files(path, "huggingface")
    assert path / "additional_chat_templates" / "other.txt" not in checkpoint_files(path, "huggingface")
