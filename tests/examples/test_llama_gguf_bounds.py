"""GGUF files with counts larger than their contents, or without an end."""

import os
import struct

import pytest

from examples.llama.weights.folder import import_weights
from examples.llama.weights.gguf_file import GGUFFile
from examples.llama.weights.names import BadWeights

LARGE = 2**62


def text(content, length=None):
    return struct.pack("<Q", len(content) if length is None else length) + content


def setting(kind, value):
    return text(b"a") + struct.pack("<I", kind) + value


def tensor(*axes, kind=0):
    layout = f"<I{len(axes)}QIQ"
    return text(b"t") + struct.pack(layout, len(axes), *axes, kind, 0)


def array(kind, count):
    return setting(9, struct.pack("<IQ", kind, count))


@pytest.mark.parametrize(
    ("tensors", "settings", "rest", "message"),
    [
        (0, LARGE, b"", "4,611,686,018,427,387,904 settings"),
        (LARGE, 0, b"", "4,611,686,018,427,387,904 tensors"),
        (0, 2**22, 20 * setting(4, b"abcd"), "it ends early"),
        (2**22, 0, 3 * tensor(1), "it ends early"),
        (0, 1, text(b"a", LARGE), "4,611,686,018,427,387,904 bytes of a setting or"),
        (0, 1, setting(8, text(b"a", LARGE)), "bytes of a setting or a name, more"),
        (0, 1, array(0, LARGE), "904 values of one setting"),
        (0, 1, array(8, LARGE), "904 values of one setting"),
        (0, 1, array(4, 2**22), "16,777,216 bytes of a setting or a name, more"),
        (0, 1, array(8, 2**22) + 9 * text(b"a"), "it ends early"),
        (0, 1, array(9, 1) + 99 * struct.pack("<IQ", 9, 1), "an array of arrays"),
        (0, 1, array(77, 1), "77 is not a valid"),
        (0, 1, setting(77, b"a"), "77 is not a valid"),
        (1, 0, text(b"t") + struct.pack("<I", 2**31), "a tensor of 2,147,483,648 axes"),
        (1, 0, tensor(2**32, 2**32), "a tensor of 18,446,744,073,709,551,616 numbers"),
        (1, 0, tensor(0, LARGE), ""),
        (1, 0, tensor(4, kind=999), "999.* is not a valid"),
        (2, 0, tensor(1) + tensor(1) + bytes(99), "duplicate"),
        (0, 1, setting(0, b"a") + bytes(99), "general.architecture is missing"),
    ],
)
def test_a_file_is_not_believed_what_it_counts(
    tmp_path, tensors, settings, rest, message
):
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, settings)
    path = tmp_path / "a.gguf"
    path.write_bytes(head + rest)
    with pytest.raises(BadWeights, match=rf"a\.gguf: .*{message}"):
        GGUFFile(path).load()


def test_what_never_ends_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(BadWeights, match=rf"{name}\.gguf: .* not a regular file"):
            import_weights(tmp_path / f"{name}.gguf", tmp_path / "a")
