"""Files that we write as torch.save does: opened by torch without running anything, and by our own reader."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from sdjax.formats.storage import pickle_writer, pickles

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
VALUES = {
    768: ({"linear.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, {}),
    "numbers": [0, -1, 255, 2**31 - 1, 2**31, -(2**31), -(2**40), 2**62, 1.5, -0.0, float("inf"), True, False, None],
    "texts": ["", "Ü", "a\nb'\"", "<new>"],
    "nested": {"a": ({"b": []}, (), [[1]]), "": {}},
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "turned": np.arange(6.0).reshape(2, 3).T,
}


def same(ours, theirs):
    """Asserts that a value that was read is the one that was written; tensors by type, shape and bits."""
    if isinstance(theirs, np.ndarray):
        ours = ours if isinstance(ours, np.ndarray) else ours.float().numpy().astype(theirs.dtype)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert type(ours) is type(theirs) and repr(ours) == repr(theirs)


def test_torch_and_we_read_what_is_written(tmp_path):
    pickle_writer.write(tmp_path / "x.pt", VALUES)
    same(torch.load(tmp_path / "x.pt", weights_only=True), VALUES)
    same(pickles.read(tmp_path / "x.pt"), VALUES)


@pytest.mark.parametrize("name", DTYPES)
def test_types_of_numbers(name, tmp_path):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    pickle_writer.write(tmp_path / "x.pt", {"x": array})
    there = torch.load(tmp_path / "x.pt", weights_only=True)["x"]
    assert there.dtype == getattr(torch, name)
    same(there, array)
    same(pickles.read(tmp_path / "x.pt")["x"], array)


def test_records_are_those_that_a1111_lets_through_and_aligned(tmp_path):
    """A1111 opens archives of these names alone: ROOT/data.pkl, ROOT/data/N, ROOT/version."""
    for name in ("one", "two"):
        pickle_writer.write(tmp_path / f"{name}.pt", VALUES)
    raw = (tmp_path / "one.pt").read_bytes()
    assert raw == (tmp_path / "two.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.pt") as archive:
        names = archive.namelist()
        assert names[0] == "archive/data.pkl" and names[-1] == "archive/version"
        assert names[1:-1] == [f"archive/data/{i}" for i in range(4)]
        assert archive.testzip() is None
        for entry in archive.infolist():
            begin = entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
            assert begin % 64 == 0 and raw[begin : begin + entry.file_size] == archive.read(entry)


@pytest.mark.parametrize("value", [{1, 2}, b"x", np.float64(1), torch.zeros(1), {"x": object()}, np.array(["x"])])
def test_what_is_no_plain_value_is_refused_and_nothing_written(value, tmp_path):
    (tmp_path / "x.pt").write_text("before")
    with pytest.raises(TypeError):
        pickle_writer.write(tmp_path / "x.pt", value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"] and (tmp_path / "x.pt").read_text() == "before"
