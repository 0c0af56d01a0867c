"""A request's body: within its size and time, and as JSON that means what it says."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from mp2.json_files import JsonError, parse_json
from mp2.serve.errors import BadRequestError, RequestError


async def read_body(request: Request, most_bytes: int, timeout_s: float) -> bytes:
    """Return the body; RequestError 413 for more than ``most_bytes``, 408 where it does not come in time.

    415 for one that is compressed: a few bytes of it could be any number of them.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise RequestError(
            415, f"Content-Encoding is {shown(encoding)}, expected none: send the body as it is"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > most_bytes):
        raise _too_large(most_bytes)
    parts, n_bytes = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes > most_bytes:
                    raise _too_large(most_bytes)
                parts.append(part)
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {timeout_s:g} s") from None
    return b"".join(parts)


def read_json(data: bytes) -> Any:
    """Return what ``data`` says; BadRequestError unless it is JSON in UTF-8, without NaN and infinities."""
    try:
        return parse_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8 (byte {error.start})") from None
    except JsonError as error:
        at = f" at line {error.line}, column {error.column}" if error.line else ""
        raise BadRequestError(f"the body: {error}{at}") from None


def shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = json.dumps(value, ensure_ascii=True, default=str) if not isinstance(value, (dict, list)) else ""
    text = text or ("an object" if isinstance(value, dict) else "a list")
    return text if len(text) <= 60 else text[:57] + "..."


def _too_large(most_bytes: int) -> RequestError:
    return RequestError(
        413, f"the body is larger than {most_bytes:,} bytes; send less at a time, or raise --max-body-mib"
    )
