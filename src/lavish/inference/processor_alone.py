"""A model's processor without its weights: what prompts and labels look like is known from the small files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lavish.models as table
from lavish.checkpoints import hub
from lavish.checkpoints.layouts import config_folder, read_config_json
from lavish.common.errors import ConfigError
from lavish.inference.load import POCKET, find_composite, open_release, read_overrides, sample_family


def load_processor(
    path_or_hub_id: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    config: Any = None,
    pieces: Mapping[str, str | Path] | None = None,
) -> Any:
    """Give the chat processor of a model; of a hub id only the small files are fetched.

    Args:
        path_or_hub_id: as `lavish.load` takes it; None is the bundled model.
        tokenizer: a folder apart from the model's.
        config: fields that replace those of config.json, as a dict or file.
        pieces: parts of a release that comes in pieces, by name.

    Raises:
        ConfigError: no such model, or one that holds no conversation.
        CheckpointError: files that are absent or damaged.
    """
    folder = POCKET if path_or_hub_id is None else hub.resolve_small(path_or_hub_id)
    given = dict(pieces or {})
    where = None if tokenizer is None else hub.resolve_small(tokenizer)
    if sample_family(folder, given) is not None:
        raise ConfigError(f"{folder}: holds no conversation, so it has no prompts; name a chat model.")
    overrides = read_overrides(config)
    if given or overrides or find_composite(folder, given) is not None:  # reads the headers of the weights too
        return open_release(folder, overrides, given).processor(where, is_overridden=bool(overrides))
    family = table.detect_family(read_config_json(config_folder(folder)), str(folder / "config.json"))
    return family.processor_class.from_pretrained(config_folder(folder), tokenizer=where)
