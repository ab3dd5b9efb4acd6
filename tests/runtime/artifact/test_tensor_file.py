import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from runtime.artifact.manifest import TensorSpec, WeightSpec
from runtime.artifact.tensor_file import ALIGNMENT, HEADER_LIMIT, TensorFile, TensorFileWriter
from runtime.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "odd": RNG.standard_normal((3, 5)).astype(np.float32),
    "half": RNG.standard_normal((7,)).astype(np.float16),
    "brain": RNG.standard_normal((4, 8)).astype(ml_dtypes.bfloat16),
    "packed": RNG.integers(-128, 128, (2, 3, 11)).astype(np.int8),
    "slots": np.arange(9, dtype=np.int64),
    "whole": np.arange(16, dtype=np.int32),
}
SPECS = [TensorSpec(name=n, shape=a.shape, dtype=str(a.dtype)) for n, a in ARRAYS.items()]


def write_ours(path: Path) -> Path:
    with TensorFileWriter(path, SPECS, {"b": "2", "a": "1"}) as writer:
        for name in reversed(ARRAYS):  # in any order
            writer.write(name, ARRAYS[name])
    return path


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_package_reads_our_file(tmp_path):
    path = write_ours(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as theirs:  # torch, because the package's numpy side has no bfloat16
        assert theirs.metadata() == {"a": "1", "b": "2"}
        assert {k for k in theirs.keys() if not k.startswith("__padding__.")} == set(ARRAYS)  # noqa: SIM118
        for name, array in ARRAYS.items():
            assert theirs.get_tensor(name).float().numpy().tolist() == array.astype(np.float32).tolist()


def test_we_read_package_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path, {"who": "them"})
    ours = TensorFile.open(path)
    assert ours.metadata == {"who": "them"}
    assert set(ours.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        read = ours.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_scalars_and_empty_tensors_as_the_package_writes_them(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.int8)}
    save_file(arrays, path)
    ours = TensorFile.open(path)
    assert ours.read("scalar") == 2.5
    assert ours.read("empty").shape == (0, 3)


def test_every_tensor_is_aligned_and_padding_is_hidden(tmp_path):
    ours = TensorFile.open(write_ours(tmp_path / "x.safetensors"))
    assert list(ours.tensors) == list(ARRAYS)
    assert {t.offset % ALIGNMENT for t in ours.tensors.values()} == {0}


def test_map_gives_aligned_writable_views_and_leaves_the_file_alone(tmp_path):
    path = write_ours(tmp_path / "x.safetensors")
    before = path.read_bytes()
    views = TensorFile.open(path).map()
    for name, array in ARRAYS.items():
        assert views[name].tobytes() == array.tobytes()
        assert views[name].ctypes.data % ALIGNMENT == 0
        assert np.from_dlpack(views[name]).ctypes.data == views[name].ctypes.data
    assert views["brain"].dtype == np.uint16
    views["odd"][:] = 0
    assert path.read_bytes() == before


def test_map_refuses_unaligned(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"begins at byte \d+, expected a multiple of 64"):
        TensorFile.open(path).map()


def test_bytes_are_deterministic(tmp_path):
    assert write_ours(tmp_path / "a").read_bytes() == write_ours(tmp_path / "b").read_bytes()


def test_size_is_known_before_writing(tmp_path):
    path = write_ours(tmp_path / "x")
    assert TensorFileWriter(path, SPECS, {"b": "2", "a": "1"}).nbytes == path.stat().st_size


def test_weight_specs_are_taken_too(tmp_path):
    spec = WeightSpec(name="w", shape=(2, 3), dtype="float32", layout="row_major")
    with TensorFileWriter(tmp_path / "x", [spec]) as writer:
        writer.write("w", np.arange(6, dtype=np.float32).reshape(3, 2).T)  # not contiguous
    assert load_file(tmp_path / "x")["w"].tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda w: w.write("odd", np.zeros((5, 3), np.float32)), "has rows of shape"),
        (lambda w: w.write("odd", np.zeros((3, 5), np.float64)), "has dtype"),
        (lambda w: w.write("other", np.zeros(1)), "not in the specs"),
        (lambda w: [w.write("odd", ARRAYS["odd"]) for _ in range(2)], "gets 120 bytes"),
        (lambda w: w.write("odd", ARRAYS["odd"]), "not fully written"),
    ],
)
def test_writer_asserts_its_contract(tmp_path, write: Callable[[TensorFileWriter], Any], message):
    with pytest.raises(AssertionError, match=message), TensorFileWriter(tmp_path / "x", SPECS) as writer:
        write(writer)


TWO = {"a": entry(0, 4, [1]), "b": entry(4, 8, [1])}
BAD_HEADERS = {
    "not valid JSON": (b"{", b""),
    "not valid JSON: .*utf-8": (b'{"\xff": 1}', b""),
    "not valid JSON: maximum recursion": (b"[" * 100_000, b""),
    "'a' appears twice": (b'{"a": 1, "a": 2}', b""),
    "is a list, expected an object": (b"[]", b""),
    "'a' is malformed": ({"a": 1}, b""),
    "'a' is malformed.*missing required field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "'a' is malformed.*unknown field": ({"a": entry(0, 4, [1]) | {"x": 1}}, bytes(4)),
    "'a' is malformed.*>= 0.*shape": ({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "'a' is malformed.*<= 281474976710656": ({"a": entry(0, 4, [2**63])}, bytes(4)),
    "'a' is malformed.*>= 0.*data_offsets": ({"a": entry(-4, 0, [1])}, bytes(4)),
    "'a' is malformed.*`int`, got `float`": (
        b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}',
        bytes(4),
    ),
    "'a' is malformed.*`int`, got `bool`": ({"a": entry(0, 4, [True])}, bytes(4)),
    "'__metadata__' is malformed": ({"__metadata__": {"a": 1}}, b""),
    "a has dtype 'F7', expected one of F64, F32": ({"a": entry(0, 4, [1], "F7")}, bytes(4)),
    r"a spans 4 bytes, expected 8 for F32 of shape \[2\]": ({"a": entry(0, 4, [2])}, bytes(4)),
    "a spans -4 bytes": ({"a": entry(4, 0, [1])}, bytes(4)),
    "b begins at byte .* and overlaps": ({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, bytes(6)),
    "b begins at byte .* and follows a gap": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "a begins at byte .* and follows a gap": ({"a": entry(4, 8, [1])}, bytes(8)),
    "is truncated: it has": (TWO, bytes(7)),
    "has bytes that belong to no tensor": (TWO, bytes(9)),
    "absurd.*spans": ({"absurd": entry(0, 2**62, [2**48, 2**48])}, b""),
}


@pytest.mark.parametrize("message", BAD_HEADERS)
def test_each_break_of_the_format_is_refused(tmp_path, message):
    path = write_raw(tmp_path / "x", *BAD_HEADERS[message])
    with pytest.raises(UserError, match=message) as caught:
        TensorFile.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234567", "has 7 bytes, expected at least 8"),
        (struct.pack("<Q", HEADER_LIMIT + 1), f"would have {HEADER_LIMIT + 1} bytes"),
        (struct.pack("<Q", 100) + b"{}", "its header ends at byte 108, but the file has 10"),
    ],
)
def test_bad_starts_are_refused(tmp_path, data, message):
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        TensorFile.open(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        TensorFile.open(tmp_path / "x")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        TensorFile.open(tmp_path)


def test_file_cut_after_opening_is_refused(tmp_path):
    path = write_ours(tmp_path / "x")
    ours = TensorFile.open(path)
    path.write_bytes(path.read_bytes()[:-128])
    with pytest.raises(UserError, match="has shrunk"):
        ours.read("whole")
