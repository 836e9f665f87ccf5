"""Files from elsewhere are read within bounds, and errors name them."""

import os

import pytest

from examples.llama import files
from examples.llama.config import file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"a": ', "not JSON: "),
        (b"[1]", "not a JSON object"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(files.BadFile, match=rf"a\.json: {message}"):
        files.read_json(path)


def test_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": "\u00e9"}', encoding="utf-8")
    (tmp_path / "link.json").symlink_to(path)
    assert files.read_json(tmp_path / "link.json") == {"a": "\u00e9"}
    assert files.read_text(path, len(path.read_bytes())) == '{"a": "\u00e9"}'
    with pytest.raises(files.BadFile, match=r"a\.json: .* over 9 bytes"):
        files.read_text(path, 9)


def test_what_never_ends_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name in ("pipe", "zero"):
        with pytest.raises(files.BadFile, match=rf"{name}\.json: not a regular file"):
            files.read_json(tmp_path / f"{name}.json")
        with pytest.raises(file.ConfigFileError, match=rf"{name}\.json: not a regular"):
            file.load(tmp_path / f"{name}.json")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "loop.json"):
        with pytest.raises(OSError, match=str(path)):
            files.read_json(path)


# Each stands for nine of those before: together for 9 ** 9 of them.
LAUGHS = "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join(9 * [f'*a{i}'])}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"a0: &a0 x\n{LAUGHS}", r"\*a0 stands for another value"),
        ("model: &m {width: 64}\ndata: {<<: *m}", r"\*m stands for another value"),
        ("[" * 60_000, "nested too deeply"),
        ("a: !!int ''", ""),
        ("a: 2001-99-99", "month must be"),
        ("a: " + 5000 * "9", "Exceeds the limit"),
    ],
)
def test_yaml_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(file.ConfigFileError, match=rf"a\.yaml: not YAML.*: {message}"):
        file.load(path)
    path.write_text(70_000 * "x")
    with pytest.raises(file.ConfigFileError, match=r"a\.yaml: .* over 65,536 bytes"):
        file.load(path)
