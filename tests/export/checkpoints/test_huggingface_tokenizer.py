"""Which tokenizer of a Hugging Face folder counts, where its texts end, and what its template is told."""

import importlib.resources
import json
import shutil
from base64 import b64encode
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from export.checkpoints.huggingface.tokenizer import open_tokenizer
from export.checkpoints.tokenizers.chat import AS_PUBLISHED, Chat, template_notes, tokenizer_notes
from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.conversation_encoder import open_conversation_encoder
from runtime.text.tokenizer import open_tokenizer as open_on_the_box

DATA = Path(str(importlib.resources.files("mistral_common") / "data"))
V1, V3 = (DATA / name for name in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"))
CONFIG = {"model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TURN = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
NAMES = "{% for m in messages %}{{ bos_token + m['content'] + eos_token + unk_token + pad_token }}{% endfor %}"
HI = [{"role": "user", "content": "hi"}]


def byte_tokenizer(*, before=("<s>",), after=(), specials=SPECIALS):
    """Byte-level BPE without merges, whose post-processor puts some of its special tokens around a text."""
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if before or after:
        used = [(name, specials.index(name)) for name in {*before, *after}]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join((*before, "$A", *after)), special_tokens=used
        )
    return tokenizer


def tekken(version="v7", special_tokens=None):
    """A tekken.json whose tokens are the bytes and "he"."""
    tokens = [*(bytes([i]) for i in range(256)), b"he"]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    sizes = {"num_vocab_tokens": 257, "default_vocab_size": 277, "default_num_special_tokens": 20}
    vocab = [{"rank": i, "token_bytes": b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    listed = {} if special_tokens is None else {"special_tokens": special_tokens}
    return json.dumps({"config": {"pattern": pattern, "version": version, **sizes}, "vocab": vocab, **listed})


@pytest.fixture
def folder(tmp_path):
    """Writes files into a folder whose config.json is `CONFIG`: JSON from dicts, tokenizers from the library's."""

    def write(**files):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            if isinstance(content, Tokenizer):
                content.save(str(path))
            elif isinstance(content, Path):
                shutil.copy(content, path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


def opened(folder, chat=AS_PUBLISHED, config=None):
    return open_tokenizer(folder, CONFIG | (config or {}), chat)[0]


def boxed(source, folder):
    """The tokenizer as a box opens it, and its manifest's record."""
    box = folder / "box"
    box.mkdir(exist_ok=True)
    (box / "tokenizer").write_bytes(source.data)
    if source.chat_template is not None:
        (box / "chat.jinja").write_text(source.chat_template, encoding="utf-8")
    spec = TokenizerSpec(
        kind=source.kind,
        file="tokenizer",
        bos_id=source.bos_id,
        add_bos=source.add_bos,
        eos_ids=source.eos_ids,
        chat_template=None if source.chat_template is None else "chat.jinja",
        instruct=source.instruct,
        special_tokens=None if source.special_tokens is None else dict(source.special_tokens),
    )
    return open_on_the_box(spec, box), spec, box


def chat_ids(source, folder, messages=HI):
    tokenizer, spec, box = boxed(source, folder)
    return open_conversation_encoder(spec, box, tokenizer).encode(messages)


# where a text ends


@pytest.mark.parametrize(
    ("generation", "config", "named", "ends"),
    [
        (2, 2, "</s>", (2,)),
        (2, 2, "<|im_end|>", (2, 4)),
        ([2, 3], 2, "<|im_end|>", (2, 3, 4)),
        (4, 2, "</s>", (4, 2)),
        (None, [4], "</s>", (4, 2)),
        (None, None, {"content": "<|im_end|>"}, (4,)),
        ([2, 300], 2, "</s>", (2, 300)),  # the tokenizer does not have it, but the model may
        (2, 2, "<|not_there|>", (2,)),
        (2, 2, None, (2,)),
        (-1, [2, None, -1], "</s>", (2,)),  # there is none
        ([], -1, "</s>", (2,)),
    ],
)
def test_a_reply_ends_where_any_file_says(folder, generation, config, named, ends):
    path = folder(
        tokenizer__json=byte_tokenizer(),
        generation_config__json={"eos_token_id": generation},
        tokenizer_config__json={"eos_token": named},
    )
    assert opened(path, config={"eos_token_id": config}).eos_ids == ends


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TURN, (2, 4)),
        ("{{ messages[0].content + '</s>' }}", (2,)),
        ("{{ messages[0].content + '<|im_start|>' + eos_token }}", (2,)),
        ("{{ messages[0].content + '<|eot_id|>' }}", (2,)),  # the tokenizer does not have it
    ],
)
def test_a_reply_ends_where_the_template_ends_turns(folder, template, ends):
    path = folder(tokenizer__json=byte_tokenizer(), chat_template__jinja=template)
    assert opened(path).eos_ids == ends


def test_a_reply_of_mistrals_own_tokenizer_ends_where_any_file_says(folder):
    path = folder(**{"tekken.json": tekken()}, generation_config__json={"eos_token_id": [4]})
    assert opened(path, config={"eos_token_id": None}).eos_ids == (4, 2)


def test_a_reply_of_a_sentencepiece_model_ends_where_any_file_says(folder):
    path = folder(tokenizer__model=V3, generation_config__json={"eos_token_id": 7})
    assert opened(path, config={"eos_token_id": None}).eos_ids == (7, 2)
    path = folder(tokenizer__model=V3, tokenizer_config__json={"eos_token": "[/INST]"})
    assert opened(path, config={"eos_token_id": None}).eos_ids == (7, 4)


# what a template is told


SETTINGS = [
    {},
    {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "</s>"},
    {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<|im_start|>", "add_bos_token": True},
    {"bos_token": None, "eos_token": "</s>", "extra_special_tokens": {"audio_token": "<|im_start|>"}},
    {"eos_token": "</s>", "extra_special_tokens": ["<|im_start|>"], "num_image_token": 256},
]
MAPS = [
    {},
    {"eos_token": "<|im_end|>", "pad_token": {"content": "<unk>", "lstrip": False}, "own_token": "<|im_start|>"},
]


@pytest.mark.parametrize("overruling", MAPS)
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_template_is_told_the_tokens_that_transformers_tells_it(folder, settings, decoder, overruling):
    added = {"4": {"content": "<|im_end|>", "special": True}}
    path = folder(
        tokenizer__json=byte_tokenizer(),
        tokenizer_config__json=settings | ({"added_tokens_decoder": added} if decoder else {}),
        special_tokens_map__json=overruling,
    )
    theirs = dict(AutoTokenizer.from_pretrained(path).special_tokens_map)
    # They leave out what no file names; older versions took <s> and </s> for these, as templates expect.
    assumed = {"bos_token": "<s>", "eos_token": "</s>"}
    named = {*settings, *(() if decoder else overruling)}
    assert opened(path).special_tokens == {k: v for k, v in assumed.items() if k not in named} | theirs


def test_a_template_writes_the_tokens_that_it_writes_in_transformers(folder):
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|im_start|>"}
    path = folder(
        tokenizer__json=byte_tokenizer(),
        tokenizer_config__json=settings | {"chat_template": NAMES},
        generation_config__json={"eos_token_id": [2, 4]},
    )
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(HI, return_dict=False)
    assert chat_ids(opened(path), path) == theirs


def test_a_template_of_a_sentencepiece_model_is_told_the_names_of_its_pieces(folder):
    template = "{% for m in messages %}{{ bos_token + m['content'] + eos_token + unk_token }}{% endfor %}"
    path = folder(tokenizer__model=V3, tokenizer_config__json={"chat_template": template})
    assert opened(path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert chat_ids(opened(path), path)[:1] == [1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eos_token": 2}, "tokenizer_config.json is malformed: "),
        ({"eos_token": {"text": "</s>"}}, "tokenizer_config.json is malformed: "),
        ({"eos_token": "x" * 2000}, "length <= 1024"),
        ({f"{i}_token": "x" for i in range(2000)}, "length <= 1024"),
    ],
)
def test_malformed_names_are_one_sentence(folder, settings, said):
    with pytest.raises(UserError, match=said):
        opened(folder(tokenizer__json=byte_tokenizer(), tokenizer_config__json=settings))


# what stands around a text


@pytest.mark.parametrize(
    ("before", "after", "settings", "bos", "end_id"),
    [
        (("<s>",), (), {}, True, None),
        (("<s>",), ("</s>",), {}, True, 2),
        ((), ("</s>",), {}, False, 2),
        ((), (), {"add_bos_token": True, "add_eos_token": True}, True, 2),
        (("<s>",), (), {"eos_token": "<|im_end|>", "add_eos_token": True}, True, 4),
        (("<s>",), ("</s>",), {"add_eos_token": False}, True, 2),  # as in transformers: the post-processor counts
        ((), ("</s>",), {"bos_token": "</s>", "eos_token": "</s>"}, False, 2),  # bos is not what follows a text
        (("<s>",), ("<|im_start|>",), {}, True, 3),
    ],
)
def test_bos_and_the_end_of_a_whole_text(folder, before, after, settings, bos, end_id):
    tokenizer = byte_tokenizer(before=before, after=after)
    plain = opened(folder(tokenizer__json=tokenizer, tokenizer_config__json=settings))
    assert (plain.add_bos, plain.end_id) == (bos, end_id)
    tokenizer.enable_padding(direction="left", pad_id=0, pad_token="<unk>", length=16)
    tokenizer.enable_truncation(1)
    spoiled = opened(folder(tokenizer__json=tokenizer))
    assert (spoiled.bos_id, spoiled.add_bos, spoiled.end_id) == (plain.bos_id, bos, end_id)


@pytest.mark.parametrize("settings", [{}, {"bos_token": "<s>"}, {"bos_token": "<s>", "add_bos_token": True}])
def test_a_text_begins_with_what_the_post_processor_puts_there(folder, settings):
    path = folder(tokenizer__json=byte_tokenizer(before=("<|im_start|>",)), tokenizer_config__json=settings)
    assert boxed(opened(path), path)[0].encode("a") == AutoTokenizer.from_pretrained(path)("a").input_ids


def test_a_wrong_bos_in_the_config_does_not_matter_beside_a_post_processor(folder):
    for wrong in (-1, 2**40, None):
        source = opened(folder(tokenizer__json=byte_tokenizer()), config={"bos_token_id": wrong})
        assert (source.bos_id, source.add_bos) == (1, True)


def test_more_than_one_token_before_a_text(folder):
    path = folder(tokenizer__json=byte_tokenizer(before=("<s>", "<|im_start|>")))
    with pytest.raises(UserError, match=r"tokenizer\.json: its post_processor puts 2 tokens before a text"):
        opened(path)
    path = folder(tokenizer_config__json={"add_bos_token": False})
    assert opened(path).add_bos is False


@pytest.mark.parametrize(("settings", "end_id"), [({}, None), ({"add_eos_token": True}, 2)])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "tekken.json"])
def test_the_end_of_a_whole_text_of_other_files(folder, name, settings, end_id):
    path = folder(**{name: tekken() if name == "tekken.json" else V3}, tokenizer_config__json=settings)
    assert opened(path).end_id == end_id


def test_a_bos_that_the_tokenizer_does_not_have_begins_no_prompt(folder):
    path = folder(tokenizer__json=byte_tokenizer(before=()), tokenizer_config__json={"add_bos_token": True})
    source = opened(path, config={"bos_token_id": 300})
    assert (source.bos_id, source.add_bos) == (300, False)
    assert boxed(source, path)[0].encode("a") == Tokenizer.from_file(str(path / "tokenizer.json")).encode("a").ids


@pytest.mark.parametrize("wrong", [-2, 2**40])
def test_ids_that_no_vocabulary_has_are_kept_for_the_check_of_the_models(folder, wrong):
    path = folder(tokenizer__json=byte_tokenizer(before=()))
    source = opened(path, config={"bos_token_id": wrong, "eos_token_id": wrong})
    assert (source.bos_id, source.add_bos, source.eos_ids, source.special_tokens) == (wrong, False, (wrong,), {})


# which file counts


def test_a_folder_with_nothing_but_tekken(folder):
    path = folder(**{"tekken.json": tekken()})
    tokenizer, _, _ = boxed(opened(path), path)
    theirs = Tekkenizer.from_file(path / "tekken.json")
    for text in ("hello  world\n", "<s>[INST]", "12 the"):
        assert tokenizer.encode(text) == theirs.encode(text, bos=True, eos=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
def test_mistrals_own_tokenizer_counts_in_a_base_model(folder, name):
    path = folder(tokenizer__json=byte_tokenizer(specials=SPECIALS[:3]))
    before = opened(path)
    path = folder(**{name: tekken() if name == "tekken.json" else V3})
    source = opened(path)
    assert source.data != before.data
    assert (source.instruct, source.chat_template, source.bos_id, source.add_bos) == (None, None, 1, True)
    assert opened(path, Chat(instruct=True)).instruct == {"tekken.json": "v7", "tokenizer.model.v3": "v3"}[name]


def test_a_model_without_template_chats_in_its_tokenizers_own_format_on_request(folder):
    path = folder(**{"tokenizer.model.v3": V3})
    pieces = SentencePieceProcessor(model_proto=V3.read_bytes())
    assert chat_ids(opened(path, Chat(instruct=True)), path) == [1, 3, *pieces.encode("hi"), 4]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer__json": byte_tokenizer()}, "has no tokenizer that declares a chat format, expected tekken.json"),
        ({"tokenizer__model": V1}, "has no tokenizer that declares a chat format, expected tekken.json"),
        ({"tekken__json": tekken(), "chat_template__jinja": TURN}, "which has a chat template for that; remove"),
        ({"tekken__json": tekken("v99", [])}, "is of version v99, whose chat format is not known"),
    ],
)
def test_a_format_of_its_own_that_there_is_not(folder, files, said):
    with pytest.raises(UserError, match=said):
        opened(folder(**files), Chat(instruct=True))


def test_a_fine_tune_beside_the_tokenizer_of_its_base(folder):
    path = folder(
        tekken__json=tekken(),
        tokenizer__json=byte_tokenizer(),
        tokenizer_config__json={"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TURN},
    )
    source, notes = open_tokenizer(path, CONFIG, AS_PUBLISHED)
    assert (source.data, source.instruct) == ((path / "tokenizer.json").read_bytes(), None)
    assert "tekken.json is not used: it lacks the token <|im_start|>, which other files of its folder add" in notes[0]
    (path / "tekken.json").unlink()  # transformers would write Mistral's own format, on which this is not trained
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(HI, return_dict=False)
    assert chat_ids(source, path) == theirs


@pytest.mark.parametrize(
    "added",
    [
        {"added_tokens__json": {"<|im_start|>": 32768, "<|im_end|>": 32769}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"32768": {"content": "<|im_start|>", "special": True}}}},
    ],
)
def test_tokens_added_beside_a_sentencepiece_model(folder, added):
    path = folder(**{"tokenizer.model.v3": V3}, tokenizer__model=V1, chat_template__jinja=TURN, **added)
    source, notes = open_tokenizer(path, CONFIG, AS_PUBLISHED)
    assert (source.kind, source.instruct, source.chat_template) == ("sentencepiece", None, TURN)
    assert "tokenizer.model.v3 is not used: it lacks the token <|im_start|>" in notes[0]


def test_a_token_that_nothing_uses_does_not_make_it_another_model(folder):
    path = folder(
        tekken__json=tekken(),
        tokenizer__json=byte_tokenizer(specials=("<unk>", "<s>", "</s>", "[PAD]")),
        tokenizer_config__json={"eos_token": "</s>", "pad_token": "[PAD]", "chat_template": "[INST] {{ eos_token }}"},
    )
    source, notes = open_tokenizer(path, CONFIG, AS_PUBLISHED)
    assert (source.instruct, notes) == ("v7", ())


ALPACA = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    "files",
    [
        {"tekken__json": tekken()},
        {"tekken__json": tekken(), "tokenizer__json": byte_tokenizer(specials=SPECIALS[:3])},
        {"tokenizer.model.v3": V3, "tokenizer__model": V3},
    ],
    ids=["alone", "beside json", "sentencepiece"],
)
def test_a_template_of_another_format_counts_beside_mistrals_own_tokenizer(folder, files):
    source = opened(folder(**files, chat_template__jinja=ALPACA))
    assert (source.instruct, source.chat_template) == (None, ALPACA)
    source = opened(folder(chat_template__jinja="{{ '[INST]' + messages[0].content + '[/INST]' }}"))
    assert source.instruct in ("v3", "v7")


def test_a_chat_format_that_is_not_known_gives_way_to_the_template(folder):
    listed = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(SPECIALS[:3])]
    path = folder(tekken__json=tekken("v99", listed), chat_template__jinja=NAMES)
    source = opened(path)  # there is no other tokenizer
    assert (source.instruct, source.chat_template) == (None, NAMES)
    assert Tekkenizer.from_file(DATA / "tekken_240911.json").unk_id == 0  # so it is called <unk>
    assert source.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    path = folder(tokenizer__json=byte_tokenizer(specials=SPECIALS[:3]))
    assert opened(path).data == (path / "tokenizer.json").read_bytes()


# a template of the user's


@pytest.mark.parametrize("own", [{}, {"chat_template__jinja": NAMES}])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": byte_tokenizer()},
        {"tokenizer__model": V3},
        {"tokenizer.model.v3": V3},
        {"tekken__json": tekken()},
    ],
    ids=["json", "model", "declared", "tekken"],
)
def test_a_given_template_wins(folder, files, own):
    given = "{% for m in messages %}{{ bos_token + m['content'] + eos_token }}{% endfor %}"
    path = folder(**files, **own)
    source = opened(path, Chat(template=given))
    assert (source.chat_template, source.instruct) == (given, None)
    tokenizer, _, _ = boxed(source, path)
    assert chat_ids(source, path) == [1, *tokenizer.encode("hi", add_bos=False), 2]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TURN, None),
        ("<|im_start|>{{ messages[0].content }}<think>[INST]</think>", None),
        ("<|user|>{{ messages[0].content }}<|end|>", "<|user|>, <|end|>"),
        ("[AVAILABLE_TOOLS]{{ messages[0].content }}", "[AVAILABLE_TOOLS]"),
        ("{{ messages[0].content + eos_token }}", "<|eot|>"),
        ("{{ messages[0].content }}", None),
    ],
)
def test_a_template_that_writes_what_the_tokenizer_lacks_is_noted(folder, template, written):
    path = folder(
        tokenizer__json=byte_tokenizer(),
        tokenizer_config__json={"eos_token": "<|eot|>", "chat_template": template},
    )
    notes = template_notes(opened(path), path)
    if written is None:
        assert notes == ()
    else:
        assert f" writes {written}, which its tokenizer has no token for" in notes[0]


def test_a_byte_order_mark_is_no_part_of_a_template(folder):
    path = folder(tokenizer__json=byte_tokenizer(), chat_template__jinja="\ufeff" + TURN)
    assert opened(path).chat_template == TURN


def test_a_folder_without_a_tokenizer_is_noted(folder):
    path = folder(tokenizer_config__json={})
    assert "has no tokenizer, expected tokenizer.json, tokenizer.model or tekken.json" in tokenizer_notes(None, path)[0]
    path = folder(vocab__json={}, **{"merges.txt": "#version: 0.2"})
    note = tokenizer_notes(opened(path), path)[0]
    assert "has no tokenizer but vocab.json, merges.txt, expected" in note
    assert note.endswith("or save it with transformers, which writes tokenizer.json")
    assert tokenizer_notes(opened(folder(tokenizer__json=byte_tokenizer())), path) == ()
