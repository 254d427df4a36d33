"""A memory-mapped safetensors file: names, shapes, types, and tensors on demand.

    file = TensorFile("cat.safetensors")
    file.shape("conv_in.weight"), file.read("conv_in.weight"), file.metadata["format"]

Source of the format: safetensors, format description.
"""

import json
import pathlib
import struct
from collections.abc import Collection

import ml_dtypes
import numpy as np

from sdjax.runtime.guard import named

# 8-bit floats, which numpy lacks; float32 represents all of their values.
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
READ = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", *FLOAT8)


class TensorFile:
    """The tensors of a safetensors file.  Only `read` takes memory.

    path: the file.  names: of all tensors.  metadata: {str: str}, perhaps empty.
    Opening raises ValueError in one line, naming the file, if it is damaged or of another kind.
    """

    def __init__(self, path: str | pathlib.Path):
        from safetensors import safe_open

        self.path = pathlib.Path(path)
        with named(self.path, f"not a whole safetensors file ({self.path.stat().st_size} bytes)"):
            self._handle = safe_open(str(path), "np")
            self.names: Collection[str] = dict.fromkeys(self._handle.keys()).keys()
            self.metadata: dict[str, str] = self._handle.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor as in the file."""
        return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor in safetensors' notation: "F32", "F16", "BF16", "F8_E4M3", "I64", ..."""
        return self._handle.get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as stored, but float8 as float32.

        Raises ValueError for unsupported types such as F8_E8M0 (exponents only, the scales of other tensors).
        """
        kind = self.dtype(name)
        if kind not in READ:
            raise ValueError(f"{self.path}: {name}: numbers of type {kind}; expected one of {', '.join(READ)}")
        return self._float8(name, FLOAT8[kind]) if kind in FLOAT8 else self._handle.get_tensor(name)

    def _float8(self, name: str, kind: type) -> np.ndarray:
        with open(self.path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            begin, end = json.loads(file.read(size))[name]["data_offsets"]  # checked when the file was opened
            file.seek(8 + size + begin)
            return np.frombuffer(file.read(end - begin), kind).reshape(self.shape(name)).astype(np.float32)
