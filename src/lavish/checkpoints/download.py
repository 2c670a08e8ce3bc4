"""Released files that are named by a URL, kept in a cache: fetched once, resumed where a download broke off.

LAVIS's weights lie on a plain web server, not on a hub. Nothing is fetched unless a caller asked for a model without
naming its file. torch is not imported.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lavish.common.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
READ_BYTES = 1 << 20


def is_url(name: object) -> bool:
    """Whether a name is a URL rather than a path."""
    return isinstance(name, str) and name.startswith(("https://", "http://"))


def cache_folder() -> Path:
    """Where fetched files are kept: LAVISH_CACHE, else XDG_CACHE_HOME/lavish, else ~/.cache/lavish."""
    if own := os.environ.get("LAVISH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lavish"


def fetch(url: str) -> Path:
    """Give the local copy of a file, fetched if the cache has none. What a broken download left is continued.

    Raises:
        ConfigError: not https (plain http is for this machine alone).
        CheckpointError: the file cannot be fetched now, or came incomplete.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1"):
        raise ConfigError(f"{url}: only https is fetched; download the file yourself and give its path.")
    name = Path(unquote(parts.path)).name
    if name in ("", "..", "."):
        raise ConfigError(f"{url}: names no file.")
    # Two releases may use one file name: the folder is the URL's digest.
    file = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if file.is_file():
        return file
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CheckpointError(f"{url}: HF_HUB_OFFLINE is set and the file is not in {file.parent}; give its path.")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{name}.part")
    try:
        _continue(url, part)
    except (urllib.error.URLError, OSError) as error:  # OSError: a broken connection, a full disk
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CheckpointError(
            f"{url}: could not be fetched ({reason}). Run again: it resumes; or give the path of the file."
        ) from error
    part.replace(file)
    return file


def _continue(url: str, part: Path) -> None:
    """Fetch what is not in `part` yet, and check that all of it came."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            is_rest = answer.status == 206
            length = answer.headers.get("Content-Length")
            expected = None if length is None else int(length) + (start if is_rest else 0)
            logger.info("fetching %s (%s bytes) to %s", url, expected or "?", part)
            with part.open("ab" if is_rest else "wb") as file:
                shutil.copyfileobj(answer, file, READ_BYTES)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to fetch
            return
        raise
    found = part.stat().st_size
    if expected is not None and found != expected:
        raise OSError(f"{found} of {expected} bytes came")
