import importlib.resources

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from runtime.chat_template import ChatTemplate, chat_ids, open_chat_template
from runtime.errors import UserError
from runtime.manifest import TokenizerSpec
from runtime.tokenizer import open_tokenizer

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
CHATML = """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
    {% if message.content == 'skip' %}{% continue %}{% endif %}
{{ '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content | trim }}{% endgeneration %}{{ '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
HELPERS = (
    "{{ {'a': '<é>', 'b': [1, 2]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}"
    "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}{{ messages[0] | tojson }}"
)
CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>there</b> & 'you'"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  spaced \n"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 東京"}, {"role": "user", "content": "skip"}],
]


@pytest.fixture(scope="module")
def transformers_tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("source", [MISTRAL, CHATML, HELPERS])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_equals_that_of_transformers(transformers_tokenizer, source, messages, add_generation_prompt):
    expected = transformers_tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt)
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_the_templates_own_refusal_is_shown():
    template = ChatTemplate(MISTRAL, bos_token="<s>", eos_token="</s>")
    with pytest.raises(UserError, match="roles must alternate"):
        template.render([{"role": "assistant", "content": "Hi"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 + 'a' }}",
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",  # immutable
        "{{ ''.__class__.__mro__ }}",  # the way out of a sandbox
        "{{ raise_exception.__globals__.keys() }}",
        "{% include 'x' %}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_strays_is_one_sentence(source):
    template = ChatTemplate(source, bos_token=None, eos_token=None, where="x.jinja")
    with pytest.raises(UserError, match=r"^x\.jinja cannot render this conversation: "):
        template.render(CONVERSATIONS[0])


def test_source_that_is_no_jinja_is_refused():
    with pytest.raises(UserError, match=r"^x\.jinja is not a valid jinja template: "):
        ChatTemplate("{% if %}", bos_token=None, eos_token=None, where="x.jinja")


def test_template_from_an_artifact_gives_mistrals_ids(tmp_path):
    data = importlib.resources.files("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    (tmp_path / "tokenizer.model").write_bytes(data.read_bytes())
    spec = TokenizerSpec(kind="sentencepiece", file="tokenizer.model", bos_id=1, add_bos=True, eos_ids=(2,), chat_template="chat.jinja")
    tokenizer = open_tokenizer(spec, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        open_chat_template(spec, tmp_path, tokenizer)
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}[/INST]{% endfor %}", encoding="utf-8")
    template = open_chat_template(spec, tmp_path, tokenizer)
    hello = tokenizer.encode("Hello", add_bos=False)
    assert chat_ids(template, tokenizer, [{"role": "user", "content": "Hello"}]) == [
        1,
        3,
        *hello,
        4,
    ]  # bos once; 3 and 4 are [INST] and [/INST]


def test_a_base_model_has_no_chat_template(tmp_path):
    spec = TokenizerSpec(kind="sentencepiece", file="tokenizer.model", bos_id=1, add_bos=True, eos_ids=(2,))
    with pytest.raises(UserError, match="has no chat template"):
        open_chat_template(spec, tmp_path, tokenizer=None)
