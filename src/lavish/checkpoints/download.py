"""Released files that are named by a URL, kept in a cache: fetched once, resumed where a download broke off.

LAVIS's weights and annotations lie on a plain web server, not on a hub. Nothing is fetched unless a caller asked for a
model or data set without naming its files. torch is not imported.
"""

from __future__ import annotations

import hashlib
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lavish.common.errors import CheckpointError, ConfigError, LavishError

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
READ_BYTES = 1 << 20
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
        ConfigError: not https (plain http is for this machine alone).
        error: the file cannot be fetched now, came incomplete, or is another one than `md5` says.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1"):
        raise ConfigError(f"{url}: only https is fetched; download the file yourself and give its path.")
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
    except (urllib.error.URLError, OSError) as fault:  # OSError: a broken connection, a full disk
        reason = fault.reason if isinstance(fault, urllib.error.URLError) else fault
        raise error(
            f"{url}: could not be fetched ({reason}). Run again: it resumes; or put the file at {file}, or give "
            "its path."
        ) from fault
    return file


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
    from huggingface_hub.utils import tqdm  # the same bar, and the same switch for it, as downloads from the hub

    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            is_rest = answer.status == 206
            length = answer.headers.get("Content-Length")
            expected = None if length is None else int(length) + (start if is_rest else 0)
            logger.info("fetching %s (%s bytes) to %s", url, expected or "?", part)
            options = {"total": expected, "initial": start if is_rest else 0, "unit": "B", "unit_scale": True}
            # disable=None: no bar where nobody looks
            with (
                part.open("ab" if is_rest else "wb") as file,
                tqdm(desc=part.stem, disable=None, **options) as bar,
            ):
                while piece := answer.read(READ_BYTES):
                    file.write(piece)
                    bar.update(len(piece))
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to fetch
            return
        raise
    found = part.stat().st_size
    if expected is not None and found != expected:
        raise OSError(f"{found} of {expected} bytes came")


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
