"""What a request is answered with when it is not served."""

from __future__ import annotations

from mp2.errors import Mp2Error


class RequestError(Mp2Error):
    """A request that gets ``status``; ``field`` is the part of it that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message if field is None else f"field '{field}': {message}")
        self.status, self.field = status, field


class BadRequestError(RequestError):
    """What was sent is wrong: 400."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(400, message, field)


class OverloadError(RequestError):
    """Too much waits already: 429."""

    def __init__(self, n_waiting: int, most: int) -> None:
        super().__init__(429, f"{n_waiting} sequences are waiting, at most {most} may; send it again later")


class LateError(RequestError):
    """It was not answered in time: 504."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(504, f"no answer within {timeout_s:g} s; send less at a time, or allow more time")
