"""A journal's line: a JSON object that ends in a checksum of itself, so that a flipped digit is noticed.

    {"step": 3, "loss": 1.25, "crc32": "8d3f0a12"}

The checksum is that of the line without it, ``{"step": 3, "loss": 1.25}``. It finds damage, not intent.
Journals of before have none, and are read: from a line with one on, all have one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

from mp2.errors import shown
from mp2.files import json_bytes
from mp2.json_files import JsonError, parse_json

_CHECK = re.compile(rb', "crc32": "([0-9a-f]{8})"\}')


def journal_line(values: Mapping[str, Any]) -> bytes:
    """The line of ``values``, with its checksum and its end."""
    plain = json_bytes(values)
    return b'%b, "crc32": "%08x"}\n' % (plain[:-1], zlib.crc32(plain))


class LineReader:
    """Reads the lines of one journal, in order.

    ``fault`` is what is wrong with the last line, which can be read: its checksum is another one, or it has
    none and one before has.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self._checked = False

    def read(self, line: bytes) -> dict[str, Any]:
        """The values of a line, without its checksum.

        Raises:
            JsonError: not a JSON object in UTF-8.
        """
        cut = len(line) - 22  # of the checksum: it has always the same length
        found = _CHECK.fullmatch(line, max(cut, 0))
        if found is not None:
            line, written = line[:cut] + b"}", int(found[1], 16)
            got, self._checked, self.fault = zlib.crc32(line), True, None
            if got != written:
                self.fault = f"its checksum is {got:08x}, expected {written:08x} as it was written"
        else:
            self.fault = "has no checksum, as lines before it have" if self._checked else None
        try:
            values = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise JsonError(f"not UTF-8: {error.reason} at byte {error.start}") from error
        if not isinstance(values, dict):
            raise JsonError("not a JSON object")
        if "crc32" in values:
            self.fault = f"its checksum {shown(values['crc32'])} is not as it was written"
        return values
