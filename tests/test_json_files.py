"""The one reader of JSON: what it refuses, and how it names it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mp2
from mp2.errors import FormatError, UsageError
from mp2.files import json_bytes
from mp2.journal_lines import LineReader, journal_line
from mp2.json_files import (
    MAX_DEPTH,
    Fields,
    JsonError,
    build,
    check,
    null_or,
    number,
    parse_json,
    read_object,
    text,
    whole,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_json_is_read_in_one_place_only() -> None:
    root = Path(mp2.__file__).parent
    reads = re.compile(r"\bjson\.loads?\(|JSONDecoder\(")
    found = {str(p.relative_to(root)) for p in root.rglob("*.py") if reads.search(p.read_text("utf-8"))}
    assert found == {
        "json_files.py",
        "export/bundle_files/reading.py",  # go into bundles, which are used without mp2
        "export/bundle_files/run.py",
    }


@given(VALUES)
def test_what_python_writes_is_read_back(value: object) -> None:
    if "inf" not in repr(value):
        assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1,]", "not JSON"),
        ("NaN", "has NaN, which is no number"),
        ('{"a": [-Infinity]}', "has -Infinity, which is no number"),
        ("1e999", "'1e999' is beyond what a float holds"),
        ("1" * 5000, "too many digits"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' stands twice"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
    ],
)
def test_what_is_not_read_is_said(spelled: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(JsonError, match=said):
        parse_json(spelled)
    path = tmp_path / "config.json"
    path.write_text(spelled)
    with pytest.raises(FormatError, match=rf"config\.json: .*{said}") as error:
        read_object(path)
    assert len(str(error.value)) < 400 + len(str(path))


def test_a_byte_order_mark_is_skipped_and_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(path) == {"a": 1}
    path.write_bytes('{"a": "数据"}'.encode("gbk"))
    with pytest.raises(FormatError, match="not UTF-8"):
        read_object(path)
    path.write_bytes(b'{"a": "' + b"x" * 100 + b'"}')
    with pytest.raises(FormatError, match=r"has 109 bytes, expected .* at most 50"):
        read_object(path, max_bytes=50)


def test_the_first_wrong_field_is_named(tmp_path: Path) -> None:
    rule = Fields({"step": whole(1), "loss": null_or(number()), "name": text})
    good = {"step": 1, "loss": None, "name": "a", "more": []}
    assert check(good, rule, "j") == good
    for change, said in (
        ({"step": 0}, "field 'step': is 0, expected a whole number, 1 or more"),
        ({"step": True}, "field 'step': is True"),
        ({"step": 10**30}, "field 'step': is 1000"),
        ({"loss": "x" * 10_000}, "field 'loss': is 'xxx.*…, expected a number or null"),
        ({"name": "a\0b"}, "field 'name'"),
        ({"name": "\ud800"}, "field 'name'"),
    ):
        with pytest.raises(FormatError, match=rf"^j: {said}"):
            check(good | change, rule, "j")
    with pytest.raises(FormatError, match="field 'step': missing"):
        check({"loss": 1.0, "name": "a"}, rule, "j")


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A config in a config."""

    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """What ``build`` makes."""

    n: int
    names: tuple[str, ...] = ()
    more: int | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.n < 1:
            raise UsageError(f"n is {self.n}, expected at least 1")


def test_a_dataclass_is_built_by_its_annotations() -> None:
    made = build(Outer, {"n": 2, "names": ["x"], "inner": {"rate": 1, "kind": "b"}}, "c.json")
    assert made == Outer(n=2, names=("x",), inner=Inner(rate=1, kind="b"))
    for values, said in (
        ([], "is \\[\\], expected an object"),
        ({}, "field 'n': missing"),
        ({"n": 1.0}, "field 'n': is 1.0, expected a whole number"),
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"n": 1, "names": "x"}, "field 'names': is 'x', expected a list"),
        ({"n": 1, "names": [1]}, "field 'names\\[0\\]': is 1, expected a text"),
        ({"n": 1, "more": "1"}, "field 'more': is '1', expected a whole number.* or null"),
        ({"n": 1, "inner": {"kind": "c"}}, "field 'inner.kind': is 'c', expected one of a, b"),
        ({"n": 1, "inner": {"x": 1}}, "field 'inner.x': unknown field, expected one of kind, rate"),
        ({"n": 1, "inner": {"rate": 10**400}}, "field 'inner.rate': is 1000"),
    ):
        with pytest.raises(FormatError, match=rf"^c\.json: {said}"):
            build(Outer, values, "c.json")


def test_any_flipped_character_of_a_journals_lines_is_noticed() -> None:
    values = [{"step": i, "loss": 1.5 * i, "task": "情感"} for i in range(3)]
    lines = [journal_line(v).rstrip(b"\n") for v in values]
    reader = LineReader()
    assert [reader.read(line) for line in lines] == values
    for at in range(len(lines[1])):
        for byte in (b"0", b"7", b'"', b" "):
            if lines[1][at : at + 1] == byte:
                continue
            damaged = lines[1][:at] + byte + lines[1][at + 1 :]
            reader = LineReader()
            reader.read(lines[0])
            try:
                found = reader.read(damaged)
            except JsonError:
                continue
            assert reader.fault is not None, (found, damaged)


def test_journals_without_checksums_are_read() -> None:
    reader = LineReader()
    assert reader.read(b'{"step": 1}') == {"step": 1}
    assert reader.fault is None
    assert reader.read(journal_line({"step": 2}).rstrip()) == {"step": 2}
    assert reader.read(b'{"step": 3}') == {"step": 3}
    assert reader.fault == "has no checksum, as lines before it have"


def test_a_path_that_is_no_utf8_survives_json() -> None:
    name = b"\xca\xfd\xbe\xdd".decode("utf-8", "surrogateescape")
    assert parse_json(json_bytes({"data": name}).decode("utf-8"))["data"] == name
