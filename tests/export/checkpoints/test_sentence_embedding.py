"""What the files of sentence-transformers say of a folder's vectors, and what of it is refused."""

import json

import pytest

from export.checkpoints.huggingface.sentence_embedding import Pooling, read_pooling
from export.checkpoints.location import checkpoint_files
from runtime.errors import UserError

OLD = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def old(*modes):
    """The file of older releases: a flag for each mode."""
    return {"word_embedding_dimension": 8, **{f"pooling_mode_{mode}": mode in modes for mode in OLD}}


def write(folder, pooling, *names, prefix="sentence_transformers.models."):
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{name}", "type": prefix + name} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("pooling", "names", "expected"),
    [
        (old("lasttoken"), ("Transformer", "Pooling", "Normalize"), Pooling("last", normalize=True)),  # e5-mistral
        (old("mean_tokens"), ("Transformer", "Pooling"), Pooling("mean")),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling", "Normalize"), Pooling("mean", normalize=True)),
        ({"pooling_mode": "lasttoken"}, ("Transformer", "Pooling"), Pooling("last")),
    ],
)
@pytest.mark.parametrize("prefix", ["sentence_transformers.models.", "sentence_transformers.base.modules.pooling."])
def test_pooling(tmp_path, pooling, names, expected, prefix):
    assert read_pooling(write(tmp_path, pooling, *names, prefix=prefix)) == expected


def test_a_folder_of_another_library(tmp_path):
    assert read_pooling(tmp_path) == Pooling("last", normalize=False)


@pytest.mark.parametrize(
    ("pooling", "names", "said"),
    [
        (
            old("cls_token"),
            (),
            r"1_Pooling/config\.json asks for the pooling cls_token, expected one of lasttoken, last",
        ),
        (old("mean_tokens", "max_tokens"), (), "asks for the pooling mean_tokens and max_tokens, expected"),
        (old(), (), "asks for the pooling of nothing"),
        (old("lasttoken"), ("Transformer", "Pooling", "Dense"), r"modules\.json has the module Dense, which is not"),
    ],
)
def test_what_the_command_cannot_do_is_refused(tmp_path, pooling, names, said):
    with pytest.raises(UserError, match=said):
        read_pooling(write(tmp_path, pooling, *names))


def test_a_malformed_file_is_one_sentence(tmp_path):
    (tmp_path / "modules.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"modules\.json is malformed"):
        read_pooling(tmp_path)


def test_its_files_count_as_files_of_the_checkpoint(tmp_path):
    folder = write(tmp_path, old("lasttoken"), "Transformer", "Pooling")
    assert folder / "1_Pooling" / "config.json" in checkpoint_files(folder, "huggingface")
