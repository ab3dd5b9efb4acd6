import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.location import checkpoint_files
from export.checkpoints.source import identity
from runtime.errors import UserError
from tests.helpers.gguf_files import finish, write_gguf
from tests.helpers.tiny import write_tiny_mistral

TENSORS = 21  # of the tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    write_tiny_mistral(folder, intermediate_size=128)
    return folder


@pytest.fixture
def split(tiny, tmp_path) -> Path:
    """A folder with the model in three parts, as the package writes them."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "x.gguf", tiny, GGMLQuantizationType.F32, split=8)
    assert [path.name for path in sorted(folder.iterdir())] == [part(i) for i in (1, 2, 3)]
    return folder


def part(number: int, count: int = 3, stem: str = "x") -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"


@pytest.mark.parametrize("named", ["", part(1), part(3)])
def test_the_parts_are_read_as_one(tiny, tmp_path, split, named):
    write_gguf(tmp_path / "whole.gguf", tiny, GGMLQuantizationType.F32)
    whole, ours = open_checkpoint(tmp_path / "whole.gguf", "auto", {}), open_checkpoint(split / named, "auto", {})
    assert (ours.model, ours.source_bytes) == (whole.model, whole.source_bytes)
    for name in whole.names():
        assert np.array_equal(ours.tensor(name), whole.tensor(name))


@pytest.mark.parametrize("named", ["", part(2)])
def test_every_part_counts(split, named):
    files = checkpoint_files(split / named)
    assert [path.name for path in files] == [part(i) for i in (1, 2, 3)]
    before = identity(files)
    with (split / part(3)).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\7")
    assert identity(checkpoint_files(split / named)) != before


def test_one_part_of_one_is_a_whole_file(tiny, tmp_path):
    write_gguf(tmp_path / "y.gguf", tiny, GGMLQuantizationType.F32)
    (tmp_path / "y.gguf").rename(tmp_path / part(1, 1, "y"))
    assert open_checkpoint(tmp_path, "auto", {}).model.n_layers == 2


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path, "auto", {})
    return str(caught.value)


@pytest.mark.parametrize("named", ["", part(1), part(3)])
def test_a_missing_part(split, named):
    (split / part(2)).unlink()
    assert f"3, but {part(2)} is not beside it; fetch all parts into one folder" in refused(split / named)


def test_a_part_that_is_a_link_out_of_the_folder(split, tmp_path):
    (split / part(2)).rename(tmp_path / "elsewhere.gguf")
    (split / part(2)).symlink_to(tmp_path / "elsewhere.gguf")
    assert f"{part(2)} is a link to" in refused(split / part(1))


def test_parts_in_another_order(split):
    (split / part(2)).rename(split / "swap")
    (split / part(3)).rename(split / part(2))
    (split / "swap").rename(split / part(3))
    assert f"{part(2)} has split.no: 2 in its header, expected 1; fetch the parts again" in refused(split / part(1))


def test_a_part_under_another_name(split, tmp_path):
    shutil.copy(split / part(1), tmp_path / "renamed.gguf")
    said = "renamed.gguf is one of 3 parts by its header and one of 1 by its name"
    assert said in refused(tmp_path / "renamed.gguf")


def test_a_part_of_another_split(split, tiny, tmp_path):
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "x.gguf", tiny, GGMLQuantizationType.F32, split=16)
    shutil.copy(tmp_path / "other" / part(2, 2), split / part(2))
    assert f"{part(2)} is one of 2 parts by its header and one of 3 by its name" in refused(split)


def rewritten(path: Path, tensors: int, total: int) -> None:
    """Write part 3 anew, with as many tensors, for a split of `total` tensors."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 3)
    writer.add_int32("split.tensors.count", total)
    for i in range(tensors):
        writer.add_tensor("blk.0.attn_norm.weight" if i == 0 else f"y{i}", np.ones(64, np.float32))
    finish(writer)


def test_parts_that_lack_tensors(split):
    rewritten(split / part(3), 0, TENSORS)
    assert f"hold 16 tensors, expected {TENSORS} by its header; fetch the parts again" in refused(split)


def test_parts_that_hold_a_tensor_twice(split):
    rewritten(split / part(3), TENSORS - 16, TENSORS)
    assert "holds the tensor blk.0.attn_norm.weight, which" in refused(split)


def test_a_folder_with_a_split_file_and_another(split):
    shutil.copy(split / part(1), split / "other.gguf")
    assert "holds 2 different .gguf files, expected one or the parts of one" in refused(split)


def companion(path: Path, architecture: str, kind: str | None = None) -> Path:
    """A file as it is published beside a model."""
    writer = GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    writer.add_tensor("v.patch_embd.weight", np.ones((2, 2), np.float32))
    finish(writer)
    return path


@pytest.mark.parametrize(
    ("architecture", "kind", "message"),
    [
        ("clip", "mmproj", "holds an image encoder, expected a language model; set frontend.checkpoint to the file"),
        ("clip", None, "holds an image encoder"),
        ("imatrix", "imatrix", "holds statistics for quantizing a model"),
        ("llama", "adapter", "holds an adapter, which changes the weights of another model"),
    ],
)
def test_what_is_published_beside_a_model_is_told_from_it(tiny, tmp_path, architecture, kind, message):
    other = companion(tmp_path / "a.gguf", architecture, kind)
    with pytest.raises(UserError, match=message):
        open_checkpoint(other, "auto", {})
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32)
    assert open_checkpoint(tmp_path, "auto", {}).model.n_layers == 2
    write_gguf(tmp_path / "y.gguf", tiny, GGMLQuantizationType.F32)
    with pytest.raises(UserError, match=r"holds 3 different \.gguf files, .*to the file, such as x\.gguf"):
        open_checkpoint(tmp_path, "auto", {})
