"""Released files that are named by a URL, kept in a cache: fetched once, resumed where a download broke off.

LAVIS's weights and annotations lie on a plain web server, not on a hub. Nothing is fetched unless a caller asked for a
model or data set without naming its files. torch is not imported.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from lavish.common.errors import CheckpointError, ConfigError, LavishError, shown

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
READ_BYTES = 1 << 20
_SAFE_IN_URL = "/%:=&?~+!$,;'@()*[]"
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", re.ASCII)
OFFLINE = ("LAVISH_OFFLINE", "HF_HUB_OFFLINE")
"""Environment variables, either of which forbids the network."""


def is_url(name: object) -> bool:
    """Whether a name is a URL rather than a path."""
    return isinstance(name, str) and name.startswith(("https://", "http://"))


def cache_folder() -> Path:
    """Where fetched files are kept: LAVISH_CACHE, else XDG_CACHE_HOME/lavish, else ~/.cache/lavish."""
    if own := os.environ.get("LAVISH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lavish"


def offline() -> str | None:
    """Give the name of the environment variable that forbids the network, or None."""
    return next((name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def fetch(
    url: str, file: str | Path | None = None, *, md5: str | None = None, error: type[LavishError] = CheckpointError
) -> Path:
    """Give the local copy of a file, fetched if there is none. What a broken download left is continued.

    Several processes may ask at once: one fetches, the others wait for it. A file that is there already is the user's,
    and is not compared with `md5`.

    Args:
        url: where it is.
        file: where to put it; None: a place of its own in the cache.
        md5: 32 hex digits that the content has to have.
        error: the class of what is raised when the file cannot be had.

    Raises:
        ConfigError: no URL, or not https (plain http is for this machine alone).
        error: the file cannot be fetched now, came incomplete, or is another one than `md5` says.
    """
    parts = _allowed(url)
    name = Path(unquote(parts.path)).name
    if name in ("", "..", "."):
        raise ConfigError(f"{url}: names no file.")
    # Two releases may use one file name: the folder is the URL's digest.
    file = Path(file) if file else cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if file.is_file():
        return file
    if variable := offline():
        raise error(
            f"{url}: {variable} is set and the file is not in {file.parent}. Put it at {file}, or give its path."
        )
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part):
            if not file.is_file():
                _continue(url, part)
                _check(url, part, md5, error)
                part.replace(file)
            elif part.is_file() and not part.stat().st_size:
                part.unlink(missing_ok=True)
    except LavishError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as fault:  # a broken connection, a full disk, odd headers
        reason = fault.reason if isinstance(fault, urllib.error.URLError) else fault
        reason = " ".join(str(reason).split()) or type(fault).__name__
        raise error(
            f"{url}: could not be fetched ({reason}). Run again: it resumes; or put the file at {file}, or give "
            "its path."
        ) from fault
    return file


def _allowed(url: str) -> SplitResult:
    """Give the parts of a URL that may be fetched."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: is no URL ({error}).") from error
    is_here = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")
    if not is_here and parts.scheme != "https":
        raise ConfigError(f"{url}: only https is fetched; download the file yourself and give its path.")
    return parts


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to what may be fetched, and nowhere else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            _allowed(urljoin(req.full_url, newurl))
        except ConfigError as error:
            raise urllib.error.URLError(f"it redirects to {error}") from error
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Keep other processes of this machine from writing the same file; where the system has no such locks, nothing."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    with part.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _continue(url: str, part: Path) -> None:
    """Fetch what is not in `part` yet, and check that all of it came."""
    start = part.stat().st_size if part.is_file() else 0
    opener = urllib.request.build_opener(_Redirects)
    request = urllib.request.Request(
        quote(url, safe=_SAFE_IN_URL), headers={"Range": f"bytes={start}-"} if start else {}
    )
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            expected = _receive(answer, url, part, start)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        _, total = _range(error.headers)
        if total == start:  # nothing is left to fetch
            return
        part.write_bytes(b"")  # what is there is no beginning of it
        _continue(url, part)
        return
    found = part.stat().st_size
    if expected is not None and found != expected:
        raise OSError(f"{found} of {expected} bytes came")


def _receive(answer: Any, url: str, part: Path, start: int) -> int | None:
    """Write the body of an answer, and give how long the whole file has to be then, where the server says."""
    from huggingface_hub.utils import tqdm  # the same bar, and the same switch for it, as downloads from the hub

    if answer.status not in (200, 206):
        raise OSError(f"the server answers with the status {answer.status} and no file")
    if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
        raise OSError(f"the server sends it compressed ({shown(encoding)}), which was not asked for")
    first, _ = _range(answer.headers)
    is_rest = answer.status == 206 and first in (None, start)
    if not is_rest and first:
        raise OSError(f"the server sends it from byte {first} on, and byte {start} was asked for")
    length = answer.headers.get("Content-Length")
    expected = None if length is None else int(length) + (start if is_rest else 0)
    logger.info("fetching %s (%s bytes) to %s", url, expected or "?", part)
    options = {"total": expected, "initial": start if is_rest else 0, "unit": "B", "unit_scale": True}
    # disable=None: no bar where nobody looks
    with part.open("ab" if is_rest else "wb") as file, tqdm(desc=part.stem, disable=None, **options) as bar:
        while piece := answer.read(READ_BYTES):
            file.write(piece)
            bar.update(len(piece))
    return expected


def _range(headers: Any) -> tuple[int | None, int | None]:
    """Give the first byte and the length of the whole file that Content-Range names; None for what it does not."""
    found = _RANGE.match(headers.get("Content-Range", ""))
    first, total = (None, None) if found is None else found.groups()
    return None if first is None else int(first), None if total in (None, "*") else int(total)


def _check(url: str, part: Path, md5: str | None, error: type[LavishError]) -> None:
    """Compare a whole file with its md5; a wrong one is removed, so that the next try starts anew."""
    if md5 is None:
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5.lower():
        part.unlink()
        raise error(
            f"{url}: came with the md5 {found}, not {md5}: damaged on its way, or changed on the server. It was "
            "removed; run again, or fetch the file yourself and give its path."
        )
