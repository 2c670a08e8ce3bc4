"""What turns pictures and text into tensors, shared by the families: exact resizing, tokenizers, named processors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavish.common.registry import registry


def load_processor(name: str, cfg: Mapping[str, Any] | None = None) -> Any:
    """Make a processor by its name, with the settings of `cfg`: LAVIS's call.

    Raises:
        ConfigError: no processor has that name, or it has no such setting; the nearest is suggested.
    """
    return registry.get_processor_class(name).from_config(cfg)
