"""lavish: load, chat with, fine-tune, evaluate, convert and serve a generation of open vision-language models.

Importing lavish is light: torch and transformers are imported by the first call that needs them.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VLM", "Reply", "__version__", "build", "load", "register"]

if TYPE_CHECKING:
    from lavish.inference.build import build
    from lavish.inference.load import load
    from lavish.inference.register import register
    from lavish.inference.vlm import VLM, Reply

_LAZY = {
    "load": "lavish.inference.load",
    "build": "lavish.inference.build",
    "register": "lavish.inference.register",
    "VLM": "lavish.inference.vlm",
    "Reply": "lavish.inference.vlm",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lavish' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
