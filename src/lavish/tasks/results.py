"""Results of an evaluation over several processes: merged by id, each once, and written whole or not at all.

Source: salesforce/LAVIS, lavis/tasks/base_task.py, save_result: a file for each rank, then all of them in the order of
the ranks, the first of each id. Here the processes exchange them, and no file of a rank is left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavish.common import dist
from lavish.common.config import write_json
from lavish.common.errors import DataError


def merge_results(result: list[Any], key: str = "") -> list[Any]:
    """Give the results of all processes in the order of their ranks; with `key` only the first of each id.

    Raises:
        DataError: a result without that key.
    """
    merged = [one for part in dist.gather(list(result)) for one in part]
    return first_of_each(merged, key) if key else merged


def first_of_each(results: list[Any], key: str) -> list[Any]:
    """Give the results without those whose id, `result[key]`, came before.

    Raises:
        DataError: a result without that key.
    """
    kept: dict[Any, Any] = {}
    for one in results:
        if not isinstance(one, Mapping) or key not in one:
            raise DataError(f"A result has no {key!r}, by which results are merged: {one!r:.200}.")
        kept.setdefault(one[key], one)
    return list(kept.values())


def save_result(result: list[Any], result_dir: str | Path, filename: str, remove_duplicate: str = "") -> str:
    """Merge the results of all processes, write them as `<result_dir>/<filename>.json` and give that path.

    Every process calls it with its own results, and finds the file written when it returns.

    Raises:
        DataError: a result without the key `remove_duplicate`.
    """
    path = Path(result_dir) / f"{filename}.json"
    merged = merge_results(result, remove_duplicate)
    dist.on_main(lambda: write_json(merged, path))
    return str(path)
