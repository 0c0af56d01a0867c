"""Files from the web: resumed where they were cut off, checked, kept whole."""

from __future__ import annotations

import errno
import hashlib
import http.client
import lzma
import re
import struct
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from mp2.errors import FormatError, Mp2Error, UsageError
from mp2.files import own_opener, write_bytes

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60
MOST_BYTES = 4 << 30  # of a file in an archive
_SCHEMES = ("https://", "http://")


def download(address: str, folder: Path, digest: str | None = None) -> Path:
    """Return the file of an address, downloaded to ``folder`` unless it is there already.

    A download that was cut off goes on where it ended, if the server can do that. ``digest`` is
    ``sha256:...`` or ``md5:...`` of the file; one that differs is removed.

    Raises:
        Mp2Error: the server cannot be reached, or does not have the file.
        FormatError: the digest differs.
    """
    if not address.startswith(_SCHEMES):
        raise UsageError(f"address {address}: expected http:// or https://")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "_", address.rsplit("/", 1)[1])[-80:]
    path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"
    if not path.is_file():
        partial = path.with_name(path.name + ".part")
        _get(address, partial)
        partial.replace(path)
    if digest is not None:
        kind, _, expected = digest.partition(":")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != expected:
            path.unlink()
            raise FormatError(
                f"{kind} is {found}, expected {expected}: the file came damaged, or has another version now; "
                "it was removed, try again",
                path=address,
            )
    return path


def _get(address: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            go_on = start > 0 and answer.status == 206  # else the server sends it from its beginning
            with open(partial, "ab" if go_on else "wb", opener=own_opener) as file:
                while data := answer.read(CHUNK_BYTES):
                    file.write(data)
            expected = answer.headers.get("Content-Length")
            found = partial.stat().st_size - (start if go_on else 0)
            if expected is not None and found < int(expected):
                raise Mp2Error(f"{address}: cut off after {found} of {expected} bytes; run it again to go on")
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send
            return
        raise Mp2Error(f"{address}: {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise Mp2Error(f"{address}: {getattr(error, 'reason', error)}; be online, or run it again") from error


def member(archive: Path, name: str, to: Path) -> Path:
    """Return the file of a zip or tar archive whose path ends in ``name``, written to the folder ``to``.

    Raises:
        FormatError: not an archive, or without exactly one such file.
    """
    path = to / f"{archive.name}-{Path(name).name}"
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                one = opened.getinfo(_only(opened.namelist(), name, archive))
                _check_size(one.file_size, archive, name)
                write_bytes(path, opened.read(one))
            return path
        with tarfile.open(archive) as tar:
            found = tar.extractfile(_only([m.name for m in tar.getmembers() if m.isfile()], name, archive))
            assert found is not None  # it is a file
            data = found.read(MOST_BYTES + 1)
            _check_size(len(data), archive, name)
            write_bytes(path, data)
        return path
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a full disk, no damage
            raise
        raise FormatError(f"not a zip or tar archive: {error}", path=archive) from error
    except (
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError),
        *(
            RuntimeError,
            NotImplementedError,
            ValueError,
            OverflowError,
            struct.error,
        ),
    ) as error:
        raise FormatError(f"not a zip or tar archive that can be read: {error}", path=archive) from error


def _check_size(n_bytes: int, archive: Path, name: str) -> None:
    """Raise FormatError for a member that no data set has: a few kilobytes can unpack to terabytes."""
    if n_bytes > MOST_BYTES:
        raise FormatError(
            f"{name} in it has {n_bytes:,} bytes or more, expected at most {MOST_BYTES:,}", path=archive
        )


def _only(members: list[str], name: str, archive: Path) -> str:
    found = [m for m in members if f"/{m}".endswith(f"/{name}") and "__MACOSX" not in m]
    if len(found) != 1:
        raise FormatError(f"the archive has {len(found)} files {name}, expected one", path=archive)
    return found[0]
