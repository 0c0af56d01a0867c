"""Text that is not UTF-8: which encoding it looks like, and how to convert it."""

from __future__ import annotations

import codecs
from pathlib import Path

SAMPLE_BYTES = 65536
_LIKELY = 0.8  # of the characters must be common ones before an encoding is named

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# of two bytes, the first ones of the characters in daily use: GB 2312 level 1, Big5 level 1
_COMMON = {"GB18030": (0xB0, 0xD7), "BIG5": (0xA4, 0xC6)}


def not_utf8(data: bytes, path: str | Path, where: str = "") -> str:
    """Return what to say of ``data`` of the file ``path`` that is not UTF-8; ``where`` in it that shows."""
    name = looks_like(data)
    if name is None:
        return f"not UTF-8{where}; save the file as UTF-8"
    shown = {"GB18030": "GBK", "BIG5": "Big5"}.get(name, name)
    file = Path(path).name
    return (
        f"not UTF-8{where}; looks like {shown}: convert it with iconv -f {name} -t UTF-8 {file} > utf8-{file}"
    )


def looks_like(data: bytes) -> str | None:
    """Return iconv's name of the encoding that ``data`` looks like: UTF-16, GB18030, BIG5; None: unknown."""
    sample = data[:SAMPLE_BYTES]
    if sample.startswith(_UTF16) or sample.count(0) > len(sample) // 4:
        return "UTF-16"
    shares = {name: _common_share(sample, name) for name in _COMMON}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= _LIKELY else None


def _common_share(sample: bytes, encoding: str) -> float:
    """Return the share of characters in daily use among those of two bytes; 0 where it does not decode."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        text = decoder.decode(sample)  # a character cut off at the end is no error
    except UnicodeDecodeError:
        return 0.0
    first, last = _COMMON[encoding]
    words = [char.encode(encoding) for char in text if ord(char) > 0x7F and char.isalpha()]
    return sum(len(w) == 2 and first <= w[0] <= last for w in words) / len(words) if words else 0.0
