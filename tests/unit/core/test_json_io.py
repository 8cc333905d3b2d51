"""The reader of JSON and JSON lines: what it accepts and refuses, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg.core.errors import UsageError
from fmg.core.json_io import (
    MAX_DEPTH,
    JsonError,
    parse,
    parse_object,
    read_json,
    read_lines,
    read_object,
    read_objects,
)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -3,
        1.5,
        10**300,
        1e308,
        "a",
        "",
        [],
        {},
        {"a": [1, {"b": None}]},
        "\u2028\u2029\x85",
        "\U0001f600",
    ],
    ids=lambda value: repr(value)[:24],
)
def test_every_plain_value_is_read_as_python_reads_it(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse(text) == value
        assert parse(text.encode()) == value
        assert parse(b"\xef\xbb\xbf" + text.encode()) == value
        assert parse("\ufeff" + text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value, column 1"),
        ("{", "column 2"),
        ('{\n"a": }', "line 2, column 6"),
        ("1 2", "Extra data"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
        ("[" * 65 + "]" * 65, "nested deeper than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
        ("9" * 5000, "an integer has 5000 digits"),
        ("-" + "9" * 400, "an integer has 400 digits"),
        ("1e400", "the number 1e400 is too large"),
        ("-1e999", "the number -1e999 is too large"),
        ("NaN", "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        (r'"\ud83d"', "unpaired surrogate"),
        (r'{"a": ["\uDC00"]}', "unpaired surrogate"),
        (r'{"\ud83d": 1}', "unpaired surrogate"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        (b'"\xff"', "not UTF-8 (byte 1)"),
        (b'"\xed\xa0\xbd"', "not UTF-8"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_refused_is_one_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(JsonError) as refused:
        parse(text)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_deepest_value_and_a_whole_surrogate_pair_are_read() -> None:
    deep = "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH
    assert parse(deep) == json.loads(deep)
    assert parse(r'"\ud83d\ude00"') == "\U0001f600"
    # brackets inside a text nest nothing
    assert parse(json.dumps("[" * 500)) == "[" * 500


def test_a_file_has_a_bound_and_holds_an_object(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_object(file) == parse_object(file.read_bytes()) == {"a": 1}
    with pytest.raises(JsonError, match="more than 8 bytes"):
        read_json(file, max_bytes=8)
    file.write_text("[]")
    with pytest.raises(JsonError, match="not a JSON object"):
        read_object(file)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_feeds_and_carriage_returns_only(end: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(f"\ufeffone\u2028\x0b\x1c{end}{end}three".encode())
    lines = list(read_lines(file))
    assert [(line.number, line.text(), line.ended) for line in lines] == [
        (1, "one\u2028\x0b\x1c", True),
        (2, "", True),
        (3, "three", False),
    ]


def test_lines_and_files_of_lines_have_bounds(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"12345\n1234567\n")
    with pytest.raises(JsonError, match="more than 6 bytes") as refused:
        list(read_lines(file, max_line=6))
    assert refused.value.line == 2
    assert len(list(read_lines(file, max_line=7))) == 2
    with pytest.raises(JsonError, match="the file has more than 10 bytes"):
        list(read_lines(file, max_bytes=10))


def test_objects_come_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"a": "x\u2028y"}\r\n\r\n{"b": 2}'.encode())
    assert list(read_objects(file)) == [(1, {"a": "x\u2028y"}), (3, {"b": 2})]


@pytest.mark.parametrize("line", [b"[1]", b"\xff", b"{", b'{"a": 1e999}'], ids=repr)
def test_a_bad_line_is_named_with_its_file(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(UsageError, match=r"a\.jsonl:2: "):
        list(read_objects(file))
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_objects(tmp_path))
