"""The JSON files of a checkpoint's folder (configs, indices), read with one set of errors. torch is not imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavish.common.errors import CheckpointError

MAX_BYTES = 6_000_000
"""The index of a CogVLM2 has 120 kB. As Python's objects a file may take 25 times its bytes."""
MAX_WORDS_BYTES = 48_000_000
"""Of a vocabulary: Llama 3's tokenizer.json has 9 to 17 MB."""
WORDS = ("tokenizer.json", "vocab.json")


NOT_FROM_FILES = ("attn_implementation", "experts_implementation", "attribute_map", "num_labels")
"""Fields that transformers' config classes obey. The first two choose code, which transformers fetches and imports when
the value is `org/repo`; the third renames fields of the class; the last is a number of names to make up."""


def _without_orders(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out of an object of a config what would tell transformers which code to run, and its private fields."""
    return {name: value for name, value in fields.items() if name not in NOT_FROM_FILES and not name.startswith("_")}


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; of a config, `*config.json`, without the fields of `NOT_FROM_FILES` at
    any depth: which attention runs is the caller's choice, and no file's.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or holds something else.
    """
    try:
        most = MAX_WORDS_BYTES if path.name in WORDS else MAX_BYTES
        if (found := path.stat().st_size) > most:
            raise CheckpointError(f"{path}: {found} bytes, and a file of this kind has at most {most}; fetch it again.")
        hook = _without_orders if path.name.endswith("config.json") else None  # a vocabulary may hold any word
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=hook)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, an integer of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__} and not an object; fetch it again.")
    return content


def read_optional_object(path: Path) -> dict[str, Any]:
    """Read a file that a release may lack; without it the object is empty.

    Raises:
        CheckpointError: as `read_object`.
    """
    return read_object(path) if path.is_file() else {}
