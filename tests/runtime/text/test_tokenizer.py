import importlib.resources
import random
import shutil

import pytest
import sentencepiece
import tokenizers
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from export.checkpoints.gguf.tokenizer import recover
from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.stream import Step, with_text
from runtime.text.tokenizer import open_tokenizer

V1 = "tokenizer.model.v1"
V3 = "mistral_instruct_tokenizer_240323.model.v3"
V7 = "mistral_instruct_tokenizer_241114.model.v7"
DATA = importlib.resources.files("mistral_common") / "data"

TEXTS = [
    "Hello",
    " Hello",
    "  two spaces  and   three ",
    "\n\tdef f(x):\n    return x  # ok\n",
    "naïve café — “quotes”",
    "👩‍👩‍👧‍👦 family 🎉🎊",
    "東京は日本の首都です。中文也可以",
    "Ⅷ ﬁ \u0378 🫠 rare",  # pieces that fall back to bytes
    "[INST] not a control token [/INST] <s> </s> <0x41>",
    "",
    " ",
]


def sentencepiece_spec(file, **changes):
    return TokenizerSpec(
        **{"kind": "sentencepiece", "file": file, "bos_id": 1, "add_bos": True, "eos_ids": (2,), **changes}
    )


def open_both(file):
    """One of Mistral's own tokenizers: ours and the library's."""
    with importlib.resources.as_file(DATA) as folder:
        return open_tokenizer(sentencepiece_spec(file), folder), sentencepiece.SentencePieceProcessor(
            model_file=str(folder / file)
        )


@pytest.fixture(scope="module", params=[V1, V3, V7])
def real(request):
    return open_both(request.param)


@pytest.fixture(scope="module", params=[V1, V3, V7, "byte_level", "metaspace"])
def both(request):
    """Our tokenizer and the library's, of every kind."""
    return open_both(request.param) if "model" in request.param else request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A trained ByteLevel BPE like those of Llama-like models.

    It has special tokens, and a post-processor that prepends bos.
    """
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(8)  # some published files keep this from training
    folder = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    return open_tokenizer(json_spec(), folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    """A tokenizer.json in the style of a converted SentencePiece model.

    It has byte fallback, and a decoder that strips one leading space.
    """
    letters = sorted(set("".join(TEXTS).replace(" ", "▁")) - set("東京🎉Ⅷ"))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁Hello", "▁▁"]
    library = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    folder = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    return open_tokenizer(json_spec(bos_id=1, eos_ids=(2,)), folder), library


def json_spec(**changes):
    return TokenizerSpec(
        **{"kind": "tokenizer.json", "file": "tokenizer.json", "bos_id": 0, "add_bos": True, "eos_ids": (1,), **changes}
    )


def pushes(tokenizer, ids, after=()):
    stream = tokenizer.stream(after)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_text_equals_the_library(real, text):
    ours, library = real
    ids = ours.encode(text)
    assert ids == [1, *library.encode(text)]
    assert ours.decode(ids) == library.decode(ids) == text
    assert ours.encode(text, add_bos=False) == ids[1:]


@pytest.mark.parametrize(("file", "version"), [(V1, "v1"), (V3, "v3")])
def test_template_text_gives_the_ids_of_mistrals_own_chat_encoder(file, version):
    messages = [
        UserMessage(content="Hi there"),
        AssistantMessage(content="Hello!"),
        UserMessage(content=" two  spaces\nand 東京"),
    ]
    expected = (
        getattr(MistralTokenizer, version)().encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    )
    prompts = {  # as the chat templates of the checkpoints write them
        "v1": "<s> [INST] Hi there [/INST] Hello!</s> [INST]  two  spaces\nand 東京 [/INST]",
        "v3": "<s>[INST] Hi there[/INST] Hello!</s>[INST]  two  spaces\nand 東京[/INST]",
    }
    with importlib.resources.as_file(DATA) as folder:
        ours = open_tokenizer(sentencepiece_spec(file), folder).encode_rendered(prompts[version])
    assert ours == expected


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_text_equals_the_library(byte_level, text):
    ours, library = byte_level
    library.no_truncation()
    library.encode_special_tokens = True
    ids = ours.encode(text, add_bos=False)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True) == text


def test_bos_is_added_once_and_as_the_spec_says(byte_level, tmp_path):
    ours, library = byte_level
    assert library.encode("Hello").ids[0] == 0  # the post-processor is active
    ids = ours.encode("Hello")
    assert ids[0] == 0
    assert ids.count(0) == 1
    library.save(str(tmp_path / "tokenizer.json"))
    without = open_tokenizer(json_spec(add_bos=False), tmp_path)
    assert without.encode("Hello") == ids[1:]
    assert without.encode("Hello", add_bos=True) == ids


def test_control_tokens_are_text_unless_asked_for(byte_level, real):
    ours, library = byte_level
    text = "<|im_start|>user\nHello</s>"
    assert ours.decode(ours.encode(text)) == text
    library.encode_special_tokens = False
    library.no_truncation()
    assert ours.encode_rendered(text) == library.encode(text, add_special_tokens=False).ids
    mistral, pieces = real
    assert mistral.encode_rendered("<s>Hello</s>") == [1, *pieces.encode("Hello"), 2]
    assert 2 not in mistral.encode("<s>Hello</s>", add_bos=False)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_whole_and_complete(both, text):
    ours, library = both
    ids = ours.encode(text, add_bos=True)
    pieces = pushes(ours, ids)
    assert "".join(pieces) == ours.decode(ids) == library.decode(ids) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_streamed_text_of_any_ids_equals_the_library(both):
    ours, library = both
    draw = random.Random(0)
    alphabet = [token_id for text in TEXTS for token_id in ours.encode(text, add_bos=True)]
    compared = 0
    for _ in range(200):
        ids = draw.choices(alphabet, k=draw.randint(1, 12))
        whole = library.decode(ids)
        streamed = "".join(pushes(ours, ids))
        assert streamed == ours.decode(ids)
        # the ByteFallback decoder of `tokenizers` gives up a run of bytes, good ones too, when one of them is wrong: a
        # stream cannot do so
        if not (
            isinstance(library, tokenizers.Tokenizer)
            and "ByteFallback" in str(library.decoder)
            and "\N{REPLACEMENT CHARACTER}" in whole
        ):
            assert streamed == whole
            compared += 1
    assert compared > 50


def test_an_incomplete_character_waits_and_a_broken_one_is_replaced(real):
    ours, library = real
    euro = [library.piece_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    hello = library.encode("Hello")
    assert pushes(ours, [*hello, *euro, *hello]) == ["Hello", "", "", "€", " Hello", ""]
    cut = pushes(ours, [*hello, *euro[:2]])
    assert cut == ["Hello", "", "", library.decode([*hello, *euro[:2]]).removeprefix("Hello")]
    assert "".join(pushes(ours, [euro[0], *hello])) == library.decode([euro[0], *hello])


@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [("The capital is", " Paris"), ("2 +", " 2"), ("x=(", "1)"), ("", "Paris"), ("Look:", "\n  x")],
)
def test_a_continuation_keeps_the_space_to_its_prompt(both, prompt, continuation):
    ours, _ = both
    prompt_ids = ours.encode(prompt)
    ids = ours.encode(prompt + continuation)
    assert ids[: len(prompt_ids)] == prompt_ids  # the texts are chosen so that the prompt's ids do not change
    assert "".join(pushes(ours, ids[len(prompt_ids) :], after=prompt_ids)) == continuation


def test_ids_beyond_the_vocabulary_have_no_text(real, byte_level):
    for ours, _ in (real, byte_level):
        ids = ours.encode("Hello", add_bos=True)
        assert ours.decode([*ids, 200_000]) == "Hello"
        assert ours.token_text(200_000) is None


def test_a_lone_surrogate_is_refused(real):
    with pytest.raises(UserError, match="not valid Unicode at character 2"):
        real[0].encode("ab\udce9")


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"not a tokenizer"])
def test_a_broken_file_is_refused_by_name(tmp_path, kind, content):
    if content is not None:
        (tmp_path / "broken").write_bytes(content)
    with pytest.raises(UserError, match="broken does not load as a tokenizer"):
        open_tokenizer(sentencepiece_spec("broken", kind=kind), tmp_path)


def test_a_bos_that_the_file_lacks_is_refused(tmp_path):
    with importlib.resources.as_file(DATA) as folder:
        shutil.copy(folder / V1, tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="has no token 32000, which the manifest names as bos"):
        open_tokenizer(sentencepiece_spec("tokenizer.model", bos_id=32000), tmp_path)
    with pytest.raises(UserError, match="add_bos without a bos_id"):
        open_tokenizer(sentencepiece_spec("tokenizer.model", bos_id=None), tmp_path)


def test_an_end_that_the_file_lacks_needs_no_name():
    with importlib.resources.as_file(DATA) as folder:
        tokenizer = open_tokenizer(sentencepiece_spec(V1, eos_ids=(32000, 2)), folder)
    assert tokenizer.decode([32000, *tokenizer.encode("so", add_bos=False)]) == "so"


@pytest.mark.parametrize("file", [V1, V3, V7])
def test_a_stop_string_that_names_a_control_token_stands_for_it(file):
    tokenizer, _ = open_both(file)
    before, after = (tokenizer.encode(text, add_bos=False) for text in ("so it ends", "or not"))
    for name, control in tokenizer.control_tokens.items():
        ids = [*before, control, *after]
        steps = list(with_text(map(Step, ids), tokenizer.text_stream(["ends?", name])))
        assert "".join(step.text for step in steps) == "so it ends"
        assert (len(steps), steps[-1].finish_reason) == (len(before) + 1, "stop")
        steps = list(with_text(map(Step, ids), tokenizer.text_stream(["not"])))
        assert (len(steps), steps[-1].finish_reason) == (len(ids), "stop")


def test_no_space_comes_in_front_of_a_user_defined_piece_of_a_gguf(tmp_path):
    """llama.cpp splits a text at such pieces; each stretch behind one is a text of its own, with a space in front."""
    letters = list("▁hi")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "<|im_start|>"]
    header = {
        "model": "llama",
        "tokens": names,
        "scores": [0.0] * len(names),
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(letters), 4],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    source = recover({f"tokenizer.ggml.{key}": value for key, value in header.items()}, "x")
    (tmp_path / "tokenizer.model").write_bytes(source.data)
    spec = TokenizerSpec(
        kind="sentencepiece",
        file="tokenizer.model",
        bos_id=1,
        add_bos=False,
        eos_ids=(2,),
        text_after_added=source.text_after_added,
    )
    ours = open_tokenizer(spec, tmp_path)
    pieces = [ours.token_text(i) for i in ours.encode("<|im_start|>hi<|im_start|> hi")]
    assert pieces == ["<|im_start|>", "▁", "h", "i", "<|im_start|>", "▁", "▁", "h", "i"]
