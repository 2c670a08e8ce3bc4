"""The directory of a zip file, opened with bounds: what a stranger's file may cost before anything of it is known.

`zipfile` reads a directory of whatever size the file claims and makes an object of each entry; here a directory that
no file of weights has is refused first, and everything that `zipfile` raises becomes one typed error.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavish.common.errors import CheckpointError

MAX_DIRECTORY_BYTES = 4_000_000
"""Of a torch file's entry there are about 100, and a CogVLM2 has 1221 of them: 40,000 tensors, listed in a second."""


class _Bounded(io.FileIO):
    """A file of which no single read is larger than `most` bytes."""

    most = MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            here = self.tell()
            size = max(self.seek(0, 2) - here, 0)
            self.seek(here)
        if size > self.most:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)


@contextmanager
def open_archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file for as long as the block runs; its records may be read there.

    Raises:
        CheckpointError: no zip file, damaged, or with a directory beyond `MAX_DIRECTORY_BYTES`; also where reading a
            record in the block finds it damaged.
    """
    try:
        with _Bounded(str(file)) as handle, zipfile.ZipFile(handle) as archive:
            handle.most = file.stat().st_size  # records are as long as they are
            yield archive
    except CheckpointError:
        raise
    # What zipfile raises, OSError of a seek to before the beginning among them.
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{file}: not a torch zip file ({error}): cut off while it was fetched, or saved by torch before 1.6. "
            "In the second case save it as safetensors with the torch that made it, on a machine where you trust "
            "the file."
        ) from error
