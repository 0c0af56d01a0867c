"""Answers in JSON, and refusals with their reason."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from mp2.serve.errors import RequestError


def json_reply(value: Any, status: int = 200) -> Response:
    """Return ``value`` as JSON; ValueError for a number that is not finite."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text.encode("utf-8", "replace"), status, media_type="application/json")


def refusal(error: RequestError) -> Response:
    """Return the reason of a refusal as ``error`` and, where one thing is wrong, its name as ``field``."""
    reply = json_reply({"error": str(error)} | ({"field": error.field} if error.field else {}), error.status)
    if error.status in (429, 503):
        reply.headers["Retry-After"] = "1"
    return reply
