"""What the processors of the chat families share around their prompts: checks, padding to a batch, ids back.

The prompt itself, which every release writes in its own way, and its labels stand in the family's processor.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from lavish.common.errors import MediaError, PromptError, check_path, shown

IGNORE_INDEX = -100
"""Label of what is not learnt."""


def local_folder(name_or_path: str | Path, revision: str | None) -> Path:
    """Give the folder of a path or hub name; a hub name is fetched."""
    check_path(name_or_path, "the folder")
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    from lavish.checkpoints import hub  # only a hub name needs it

    return hub.resolve(str(name_or_path), revision=revision)


# -- messages ----------------------------------------------------------------------------------------------------------


@contextmanager
def naming_conversation(index: int, count: int) -> Iterator[None]:
    """Say in an error which of several conversations it is about."""
    try:
        yield
    except (PromptError, MediaError) as error:
        if count == 1:
            raise
        raise type(error)(f"Conversation {index} of {count}: {error}") from error


def check_one_image(places: Sequence[int], why: str) -> None:
    """Refuse a second image; `places` are the indices of the messages that hold one, each time they do.

    Raises:
        PromptError: there are several.
    """
    if len(places) > 1:
        raise PromptError(
            f"The conversation holds {len(places)} images (messages {', '.join(map(str, places))}); {why}. Keep one "
            "image, or start a new conversation for the next one."
        )


def check_end(is_finished: bool, add_generation_prompt: bool, return_labels: bool) -> None:
    """Check that the last message is what the call needs: an answer to learn, or a question to answer.

    Raises:
        PromptError: it is not.
    """
    if return_labels and not is_finished:
        raise PromptError(
            "return_labels needs a conversation that ends with an answer; its last message has role 'user'."
        )
    if is_finished and not return_labels and add_generation_prompt:
        raise PromptError(
            "The conversation ends with an answer, so there is nothing to generate: add a question, or pass "
            "add_generation_prompt=False (or return_labels=True for training)."
        )


# -- rows -> batch -----------------------------------------------------------------------------------------------------


def check_batch(padding_side: Any, return_tensors: Any) -> None:
    """Check the options of `collate`.

    Raises:
        PromptError: an unknown one.
    """
    if padding_side not in ("left", "right"):
        raise PromptError(f"padding_side={padding_side!r} is unknown; use 'left' (generation) or 'right' (training).")
    if return_tensors not in (None, "pt", "np"):
        raise PromptError(f"return_tensors={return_tensors!r} is unknown; use 'pt', 'np' or None.")


def collate(
    columns: Mapping[str, Sequence[Sequence[int]]],
    pixels: Sequence[np.ndarray],
    *,
    pad_token_id: int,
    padding_side: str,
    return_tensors: str | None,
    is_single: bool,
    width: int = 0,
) -> BatchFeature:
    """Pad the columns of unpadded rows to the longest (`width` at least), and add the mask of what is not padding.

    Labels are padded with -100, ids with `pad_token_id`, other columns with 0. Pictures are left out where there is
    none. With `return_tensors=None` lists, those of a single conversation flat.

    Shapes: columns, attention_mask (batch, width) int64; pixel_values (pictures, 3, height, width).
    Raises:
        PromptError: an unknown padding_side or return_tensors.
    """
    check_batch(padding_side, return_tensors)
    ids = columns["input_ids"]
    width = max(width, *map(len, ids))
    fills = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}

    def pad(row: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (width - len(row))
        return [*padding, *row] if padding_side == "left" else [*row, *padding]

    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], **columns}
    data: dict[str, Any] = {name: [pad(row, fills.get(name, 0)) for row in rows] for name, rows in columns.items()}
    if return_tensors is not None:
        data = {name: np.asarray(rows, dtype=np.int64) for name, rows in data.items()}
    elif is_single:
        data = {name: rows[0] for name, rows in data.items()}
    if pixels:
        data["pixel_values"] = np.stack(pixels)
    return BatchFeature(data, tensor_type=return_tensors)


# -- ids -> text -------------------------------------------------------------------------------------------------------


def checked_ids(token_ids: Any) -> list[int]:
    """Give the ids of one row as a list; each kind of tokenizer answers wrong ones with another fault.

    Raises:
        PromptError: what is no id: a negative one (the -100 of labels), one that no vocabulary can hold, a text.
    """
    ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor | np.ndarray) else token_ids
    ids = ids if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else [ids]
    found: list[int] = []
    for given in ids:
        token_id = given.tolist() if isinstance(given, torch.Tensor | np.integer) else given
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            hint = " Labels of -100 are no tokens; leave them out." if token_id == IGNORE_INDEX else ""
            if isinstance(token_id, list | tuple):
                hint = " Rows of ids are for batch_decode."
            raise PromptError(f"decode takes token ids, whole numbers from 0, and found {shown(token_id)}.{hint}")
        found.append(token_id)
    return found


def rows_of_ids(sequences: Any) -> Iterable[Any]:
    """Give the rows that `batch_decode` was asked for.

    Raises:
        PromptError: they are no rows.
    """
    sequences = sequences.tolist() if isinstance(sequences, torch.Tensor) else sequences
    if isinstance(sequences, str | bytes) or not isinstance(sequences, Iterable):
        raise PromptError(f"batch_decode takes rows of token ids, not {shown(sequences)}.")
    return sequences
