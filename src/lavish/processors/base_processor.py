"""What every named processor is: a callable made from a section of a config, as in LAVIS.

Source: salesforce/LAVIS, lavis/processors/base_processor.py. Unlike there a key that a processor does not know raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lavish.common.errors import ConfigError, did_you_mean


class BaseProcessor:
    """Gives its input back. A subclass overrides `__call__`, and takes its settings as keywords of `__init__`."""

    def __call__(self, item: Any) -> Any:
        """Give the processed item."""
        return item

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> BaseProcessor:
        """Make the processor of a config section; its `name` is left out.

        Raises:
            ConfigError: a key that `__init__` does not take; the nearest is suggested.
        """
        settings = {str(key): value for key, value in (cfg or {}).items() if key != "name"}
        known = [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"{cls.__name__} has no setting {key!r}.{did_you_mean(key, known)} "
                    f"It takes {', '.join(known) or 'none'}."
                )
        return cls(**{key: _plain(value) for key, value in settings.items()})

    @classmethod
    def build(cls, **kwargs: Any) -> BaseProcessor:
        """Make the processor of keywords, as `from_config` does."""
        return cls.from_config(kwargs)


def _plain(value: Any) -> Any:
    """Give lists for the lists of OmegaConf."""
    from omegaconf import Container, OmegaConf

    return OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value
