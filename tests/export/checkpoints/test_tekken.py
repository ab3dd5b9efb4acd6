import importlib.resources
import json
import random
from base64 import b64encode
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from export.checkpoints.mistral import tekken
from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.conversations import text

FILE = Path(str(importlib.resources.files("mistral_common") / "data" / "tekken_240718.json"))
BYTES = [
    {"rank": i, "token_bytes": data, "token_str": None}
    for i, data in enumerate([b64encode(bytes([byte])).decode() for byte in range(256)])
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The converted tokenizer as the box opens it, and mistral-common's."""
    folder = tmp_path_factory.mktemp("artifact")
    converted = tekken.convert(FILE.read_bytes(), str(FILE))
    (folder / "tokenizer.json").write_bytes(converted.data)
    spec = TokenizerSpec(
        kind="tokenizer.json", file="tokenizer.json", bos_id=converted.bos_id, add_bos=True, eos_ids=(converted.eos_id,)
    )
    return open_tokenizer(spec, folder), Tekkenizer.from_file(FILE)


def test_random_texts_of_all_scripts(both):
    ours, theirs = both
    draw = random.Random(0)
    for _ in range(10_000):
        sample = text(draw, 12)
        ids = ours.encode(sample)
        assert ids == theirs.encode(sample, bos=True, eos=False)
        assert ours.decode(ids) == sample


def test_every_code_point_once(both):
    """Code points are shuffled, between letters and spaces.

    Planes that Unicode has left empty, and those of private use, contribute one point in 64.
    """
    ours, theirs = both
    dense = [*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE1000)]
    points = [chr(i) for i in [*dense, *range(0x33500, 0xE0000, 64), *range(0xE1000, 0x110000, 64)]]
    random.Random(0).shuffle(points)
    for i in range(0, len(points), 64):
        sample = " a".join(points[i : i + 64])
        assert ours.encode(sample, add_bos=False) == theirs.encode(sample, bos=False, eos=False)


def test_the_vocabulary_is_the_same(both):
    ours, theirs = both
    assert {name: ours.token_text(i) for name, i in ours.control_tokens.items()} == {
        name: name for name in ours.control_tokens
    }
    assert set(ours.control_tokens.values()) == theirs.special_ids
    assert all(ours.control_tokens[theirs.id_to_piece(i)] == i for i in theirs.special_ids)
    assert [ours.decode([i]) for i in range(1000, 131072, 7)] == [theirs.decode([i]) for i in range(1000, 131072, 7)]
    assert ours.token_text(131071) is not None
    assert ours.token_text(131072) is None


def small(**changes):
    """A tokenizer of 256 bytes and "ab", "abc", with three special tokens."""
    vocab = [
        *BYTES,
        {"rank": 256, "token_bytes": "YWI=", "token_str": "ab"},
        {"rank": 257, "token_bytes": "YWJj", "token_str": "abc"},
    ]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(("<unk>", "<s>", "</s>"))]
    config = {
        "pattern": "\\w+|\\W",
        "num_vocab_tokens": 258,
        "default_vocab_size": 262,
        "default_num_special_tokens": 4,
        "version": "v11",
    }
    file = {"config": config | changes.pop("config", {}), "vocab": vocab, "special_tokens": special} | changes
    return json.dumps(file).encode()


def test_listed_and_unnamed_special_tokens(tmp_path):
    (tmp_path / "tekken.json").write_bytes(small())
    theirs = Tekkenizer.from_file(tmp_path / "tekken.json")
    converted = tekken.convert(small(), "x")
    (tmp_path / "tokenizer.json").write_bytes(converted.data)
    spec = TokenizerSpec(kind="tokenizer.json", file="tokenizer.json", bos_id=1, add_bos=False, eos_ids=(2,))
    ours = open_tokenizer(spec, tmp_path)
    assert (converted.version, converted.bos_id, converted.eos_id) == ("v11", theirs.bos_id, theirs.eos_id)
    assert ours.control_tokens == {theirs.id_to_piece(i): i for i in range(4)}
    for sample in ("abc", "abcab cab", "<s>abc</s> <SPECIAL_3>"):
        assert ours.encode(sample) == theirs.encode(sample, bos=False, eos=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "x is not a tekken tokenizer"),
        (small(config={"version": None}), "x is not a tekken tokenizer"),
        (small(special_tokens=None), "x is of version v11 and lists no special tokens"),
        (small(special_tokens=[{"rank": 1, "token_str": "<s>"}]), "lists its special tokens out of order"),
        (
            small(special_tokens=[{"rank": 0, "token_str": "<s>"}]),
            "has 4 special tokens, expected 4 with different names, <s> and </s> among them",
        ),
        (small(config={"default_num_special_tokens": 2}), "has 3 special tokens, expected 2"),
        (
            small(special_tokens=[{"rank": i, "token_str": name} for i, name in enumerate(("<s>", "</s>", "stop"))]),
            "'stop', which is one word",
        ),
        (
            small(special_tokens=[{"rank": i, "token_str": name} for i, name in enumerate(("<s>", "</s>", "ab"))]),
            "'ab' both as a special token and as text",
        ),
        (small(vocab=BYTES), "is not 258 different tokens"),
        (small(vocab=[*BYTES, *BYTES[:2]]), "is not 258 different tokens"),
        (small(vocab=[{"rank": 0, "token_bytes": "*", "token_str": None}]), "is not base64"),
        (small(config={"pattern": "("}), "has a pattern that does not compile"),
    ],
)
def test_a_malformed_file_is_one_sentence(data, message):
    with pytest.raises(UserError, match=message):
        tekken.convert(data, "x")


def test_version_is_told_without_converting():
    assert tekken.declared_version(small(), "x") == "v11"
