"""Good files, damaged at random and read: what is still right is taken, all else refused in one line.

    campaign("run config", good, read)

``read`` is given each damaged file's bytes. What it raises must be an ``Mp2Error`` of one short line; it must
come back within a minute; what it accepts it must check itself, as far as the file can know. Every case is
seeded by its number: ``MP2_FUZZ_CASES`` (``make fuzz N=...``) says how many, and a failure names its number.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mp2.errors import Mp2Error

N_CASES = int(os.environ.get("MP2_FUZZ_CASES", "200"))
MAX_SECONDS = 60
MAX_MESSAGE = 1000  # the command line shortens lines to 400; a path takes what it takes

Damage = Callable[[random.Random, bytes], bytes]

_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308),
    *("", "x", "1", "x" * 5000, "\0", "\u200b", "\ud800", "../../x", "/dev/zero", "~", "数据", "a\nb"),
    *([], {}, [[]], [None], {"": None}, [1, 2], ["x"], {"a": {"b": {"c": []}}}),
)
_FOREIGN = (
    *(b"", b"\n", b"\0" * 5000, b"\xef\xbb\xbf", b"\xff\xfe{\x00}\x00", b"null", b"[]", b"{}", b'"x"', b"1"),
    *(b"PK\x03\x04" + b"\0" * 60, b"\x89PNG\r\n\x1a\n", b"\x1f\x8b\x08" + b"\0" * 20, b"\x80\x04}q\x00."),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    b"\x02" + b"\0" * 7 + b"{}",  # a safetensors file without tensors
    b'task = "x"\n[labels]\na = "b"\n',
    b"a,b\n1,2\n",
    b'{"event": "run"}\n{"event": "losses"}\n',
    b"[" * 100_000,
    b"9" * 100_000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
)
"""What other files hold, and what no file holds."""
_RAW = ("NaN", "Infinity", "1e999", "1" * 6000, "[" * 3000, "[" * 80 + "]" * 80, "{", "}", "'x'", "\ufeff1")


def campaign(
    name: str, good: bytes, read: Callable[[bytes], None], damages: tuple[Damage, ...] | None = None
) -> None:
    """Read damaged copies of ``good``; AssertionError names the first that was not answered well."""
    read(good)  # as it is, it is read
    for number in range(N_CASES):
        rng = random.Random(f"{name} {number}")
        damage = rng.choice(damages or (damaged_bytes, damaged_json, damaged_json))
        data = (foreign if rng.random() < 0.06 else damage)(rng, good)
        try:
            with _ends_in_time():
                read(data)
        except Mp2Error as error:
            message = str(error)
            assert "\n" not in message, f"{name} {number}: several lines: {message}"
            assert len(message) < MAX_MESSAGE, f"{name} {number}: {len(message)} characters: {message[:300]}"
        except Exception as error:
            raise AssertionError(
                f"{name} {number}: {type(error).__name__}: {error}; it read {data[:300]!r}"
            ) from error


@contextmanager
def _ends_in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def foreign(rng: random.Random, data: bytes) -> bytes:
    """Another file's content, or a part of this one's."""
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(_FOREIGN)
    at = rng.randrange(len(data) + 1)
    return data[:at] if kind < 0.85 else data[at:] if kind < 0.95 else data + data


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three bytes, runs or ends changed."""
    for _ in range(rng.randint(1, 3)):
        if not data:
            return data
        at, length = rng.randrange(len(data)), rng.choice((1, 1, 1, 2, 8, 100))
        new = rng.choice(
            (
                bytes([data[at] ^ (1 << rng.randrange(8))]),
                bytes([rng.randrange(256)]) * length,
                b"",
                data[at : at + length] * 2,
                rng.choice((b"9", b"-", b'"', b"{", b"]", b",", b"\n", b"\xff", b"\0", b"\xef\xbb\xbf")),
            )
        )
        data = data[:at] + new + data[at + (1 if rng.random() < 0.7 else length) :]
        if rng.random() < 0.05:
            data = data[: rng.randrange(len(data) + 1)]
    return data


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """One or two values of a JSON file changed, taken away, given twice, put elsewhere, or spelled badly."""
    return json_damage(rng, json.loads(data)).encode("utf-8", "surrogatepass")


def json_damage(rng: random.Random, value: Any) -> str:
    """The text of a JSON value, damaged."""
    raws: dict[str, str] = {}
    for _ in range(rng.randint(1, 2)):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.35:
            holder[key] = _value(rng)
        elif kind < 0.6:
            holder[key] = _near(rng, holder[key], places)
        elif kind < 0.7:
            raws[mark := f"<{len(raws)}>"] = rng.choice(_RAW)
            holder[key] = mark
        elif kind < 0.8:
            del holder[key]
        elif kind < 0.9 and isinstance(holder, dict):
            mark = f"<{len(raws)}>"
            raws[mark] = f"1, {json.dumps(key)}: {json.dumps(_value(rng))}"  # given twice
            holder[key] = mark
        elif isinstance(holder, dict):
            holder[rng.choice(("unknown", key + "x", key.upper()))] = holder.pop(key)
        else:
            holder.insert(key, _value(rng))
    text = json.dumps(value, ensure_ascii=False)
    for mark, raw in raws.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def _near(rng: random.Random, value: Any, places: list[tuple[Any, Any]]) -> Any:
    """A value that could be meant: of another type, one more, turned round, another field's."""
    if isinstance(value, bool):
        changed: tuple[Any, ...] = (not value, int(value), str(value))
    elif isinstance(value, int | float):
        changed = (value + 1, value - 1, -value, float(value), str(value), [value], value * 10**9)
    elif isinstance(value, str):
        changed = (value + "x", value[:-1], value.upper(), [value], {"a": value}, value * 200, value + "\0")
    elif isinstance(value, list):
        changed = (
            value[::-1],
            value[:-1],
            value + value,
            {str(i): x for i, x in enumerate(value)},
            value[:1] * 100,
        )
    elif isinstance(value, dict):
        changed = (list(value), list(value.values()), [value], dict(list(value.items())[1:]))
    else:
        changed = (0, "", [])
    holder, key = rng.choice(places)
    return copy.deepcopy(rng.choice((*changed, holder[key])))


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_VALUES))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (object or list, key or index) in a value."""
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    for key in keys or (range(len(value)) if isinstance(value, list) else ()):
        yield value, key
        yield from _places(value[key])


def damaged_lines(rng: random.Random, data: bytes) -> bytes:
    """A file of JSON lines with a line damaged, taken away, given twice, or cut."""
    lines = data.split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    kind = rng.random()
    if kind < 0.5:
        lines[at] = json_damage(rng, json.loads(lines[at])).encode("utf-8", "surrogatepass")
    elif kind < 0.6:
        del lines[at]
    elif kind < 0.7:
        lines.insert(at, lines[at])
    elif kind < 0.8:
        lines[at] = bytes(
            48 + rng.randrange(10) if 48 <= c < 58 and rng.random() < 0.2 else c for c in lines[at]
        )
    elif kind < 0.9:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    else:
        lines[at] = damaged_bytes(rng, lines[at])
    return b"\n".join(lines)


def damaged_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else, of types, shapes, places or metadata."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([x for x in header if x != "__metadata__"])
    kind = rng.random()
    if kind < 0.2:
        header[name]["dtype"] = rng.choice(
            ("F4", "I8", "U32", "C64", "F64", "BOOL", "I64", "BF16", "F16", "X")
        )
    elif kind < 0.4:
        header[name]["shape"] = rng.choice(
            ([], [0], [2**62], [-1], [1, 1, 1], [2**31, 2**31], header[name]["shape"][::-1])
        )
    elif kind < 0.5:
        header[name]["data_offsets"] = rng.choice(([0, 0], [0, 2**62], [8, 4], [-1, 4]))
    elif kind < 0.6:
        header[rng.choice(("other", "__metadata__x", "z"))] = header.pop(name)
    elif kind < 0.9 and header.get("__metadata__"):
        key = rng.choice(list(header["__metadata__"]))
        text = header["__metadata__"][key]
        try:
            header["__metadata__"][key] = json_damage(rng, json.loads(text))
        except ValueError:
            header["__metadata__"][key] = text[:-1]
    else:
        at = rng.randrange(8 + size, len(data)) if len(data) > 8 + size else 0
        value = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff" * 4))
        at -= (at - 8 - size) % 4
        return data[:at] + value + data[at + 4 :]
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 2**62, len(text) + 1, len(data) * 2))
    return length.to_bytes(8, "little") + text + data[8 + size :]


def damaged_toml(rng: random.Random, data: bytes) -> bytes:
    """A TOML file of texts, numbers and tables whose values were damaged, as `damaged_json` does."""
    values = tomllib.loads(data.decode())
    for _ in range(rng.randint(1, 2)):
        places = list(_places(values))
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.4:
            holder[key] = _value(rng)
        elif kind < 0.7:
            holder[key] = _near(rng, holder[key], places)
        elif kind < 0.85 or isinstance(holder, list):
            del holder[key]
        else:
            holder[key + "x"] = holder.pop(key)
    lines = [f"{_toml(key)} = {_toml(value)}" for key, value in values.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return "''" if value is None else json.dumps(value, ensure_ascii=False)
