"""Checks the lengths in a GGUF file before a library reads it.

A count is 64 bits, and the gguf library loops as often as it says. So this walks over
the header once and looks at nothing but lengths: what is counted must be in the file.
Layout, little endian: magic, version, number of tensors, number of settings; of each
setting a name, a kind and a value; of each tensor a name, its axes, a kind, an offset.
"""

import struct
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from examples.llama import files

# Of tensors, settings or parts of one; the largest vocabularies have some 2**18 pieces.
# A file may well be as long as it says, and hold nothing at all for terabytes.
_MOST = 2**22
_MOST_AXES = 4
_LEAST_BITS = 1  # Of a number, in the smallest of all kinds.
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_SIZES = {
    kind: np.dtype(dtype).itemsize
    for dtype, kinds in {
        "u1": ("UINT8", "INT8", "BOOL"),
        "u2": ("UINT16", "INT16"),
        "u4": ("UINT32", "INT32", "FLOAT32"),
        "u8": ("UINT64", "INT64", "FLOAT64"),
    }.items()
    for kind in (gguf.GGUFValueType[name] for name in kinds)
}


def check_bounds(path: Path) -> None:
    """Raises ``ValueError`` if something counted is not in the file."""
    files.require_regular(path)
    with path.open("rb") as file:
        _Walk(file, path.stat().st_size).whole()


class _Walk:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def whole(self) -> None:
        magic, version, tensors, settings = self._numbers("<IIQQ")
        if magic != gguf.GGUF_MAGIC or version not in (2, 3):
            raise ValueError("neither version 2 nor 3 of the format, little endian")
        _check_count(tensors, "tensors")
        _check_count(settings, "settings")
        for _ in range(settings):
            self._skip_string()
            self._skip_value(self._kind())
        for _ in range(tensors):
            self._skip_string()
            self._check_tensor()

    def _check_tensor(self) -> None:
        (count,) = self._numbers("<I")
        if count > _MOST_AXES:
            raise ValueError(f"a tensor of {count:,} axes")
        elements = 1
        for axis in self._numbers(f"<{count}Q"):
            elements *= axis
        if elements * _LEAST_BITS > 8 * self._size:
            raise ValueError(f"a tensor of {elements:,} numbers, more than it can hold")
        self._skip(4 + 8)

    def _kind(self) -> gguf.GGUFValueType:
        (number,) = self._numbers("<I")
        return gguf.GGUFValueType(number)

    def _skip_value(self, kind: gguf.GGUFValueType) -> None:
        if kind == _STRING:
            self._skip_string()
        elif kind == _ARRAY:
            of = self._kind()
            (count,) = self._numbers("<Q")
            if of == _ARRAY:
                raise ValueError("an array of arrays")
            _check_count(count, "values of one setting")
            if of != _STRING:
                self._skip(count * _SIZES[of])
                return
            for _ in range(count):
                self._skip_string()
        else:
            self._skip(_SIZES[kind])

    def _skip_string(self) -> None:
        self._skip(*self._numbers("<Q"))

    def _numbers(self, layout: str) -> tuple[int, ...]:
        content = self._file.read(struct.calcsize(layout))
        if len(content) < struct.calcsize(layout):
            raise ValueError("it ends early")
        return struct.unpack(layout, content)

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise ValueError(
                f"{count:,} bytes of a setting or a name, more than it has"
            )
        self._file.seek(count, 1)


def _check_count(count: int, of: str) -> None:
    if count > _MOST:
        raise ValueError(f"{count:,} {of}")
