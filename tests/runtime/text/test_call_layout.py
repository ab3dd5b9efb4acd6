"""The form of a model's tool calls, by its instruct format or by the control tokens that its chat template names."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runtime.artifact.manifest import TokenizerSpec
from runtime.text.chat_template import ChatTemplate, TemplateEncoder
from runtime.text.grammar import GrammarCompiler
from runtime.text.instruct_formats import CallLayout
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.mistral_tokenizers import VERSIONS, open_both

LAYOUTS = {
    "v1": None,
    "v2": CallLayout(listed=True, with_ids=False),
    "v3": CallLayout(listed=True, with_ids=True),
    "v7": CallLayout(listed=True, with_ids=True),
    "v11": CallLayout(listed=False, with_ids=True),
    "v13": CallLayout(listed=False, with_ids=False),
    "v15": CallLayout(listed=False, with_ids=False),
}
CONTROLS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[INST]")


def byte_tokenizer(folder, controls=CONTROLS, *, special=True):
    """A tokenizer with a token for each byte, and these as added tokens."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    library = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(name, special=special) for name in controls])
    library.save(str(folder / "tokenizer.json"))
    spec = TokenizerSpec(kind="tokenizer.json", file="tokenizer.json", bos_id=None, add_bos=False, eos_ids=(1,))
    return open_tokenizer(spec, folder)


@pytest.mark.parametrize("version", LAYOUTS)
def test_each_format_has_its_form_of_calls(version):
    assert open_both(VERSIONS[version])[1].call_layout == LAYOUTS[version]


@pytest.mark.parametrize(
    ("source", "layout"),
    [
        ('{{ "[TOOL_CALLS]" }}{{ call.name }}{{ "[ARGS]" }}', CallLayout(listed=False, with_ids=False)),
        ('{{ "[TOOL_CALLS]" }}{{ "[CALL_ID]" }}{{ "[ARGS]" }}', CallLayout(listed=False, with_ids=True)),
        ('{{ "[TOOL_CALLS]" }}[{"name", "id": }]', CallLayout(listed=True, with_ids=True)),
        ('{{ "[TOOL_CALLS]" }}[{"name"}]', CallLayout(listed=True, with_ids=False)),
        ("<tool_call>", None),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_a_template_has_the_form_whose_control_tokens_it_names(tmp_path, source, layout, special):
    tokenizer = byte_tokenizer(tmp_path, special=special)
    assert TemplateEncoder(ChatTemplate(source, {}), tokenizer).call_layout == layout
    without = byte_tokenizer(tmp_path, controls=("[INST]",))
    assert TemplateEncoder(ChatTemplate(source, {}), without).call_layout is None


def test_a_template_with_calls_gets_short_ids(tmp_path):
    calls = "{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.id }}{% endfor %}"
    source = "{% for message in messages %}{{ message.content }}" + calls + "{% endfor %}"
    tokenizer = byte_tokenizer(tmp_path)
    call = {"id": "call_abc123", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    ids = TemplateEncoder(ChatTemplate(source, {}), tokenizer).encode(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    text = tokenizer.decode(ids)
    assert len(text) == 1 + 9
    assert "call" not in text


@pytest.mark.parametrize("special", [True, False])
def test_dividers_are_no_text_of_a_grammar_whatever_their_kind(tmp_path, special):
    tokenizer = byte_tokenizer(tmp_path, special=special)
    compiler = GrammarCompiler(tokenizer, 300)
    constraint = compiler.compile("start: /[^a]+/", {}).begin()
    mask = constraint.allowed()
    assert mask.sum() > 100
    assert not mask[list(tokenizer.dividers)].any()
