"""Messages for Python users in the words of the command line: `tokenizer=...` becomes `--tokenizer PATH`.

Errors are raised where they are found, by code that Python calls too; here alone is known that a command asked. Only
what a message asks for is spelt anew, by the three dots or quotes that stand for a value; values of users stay.
"""

from __future__ import annotations

import re

PATHS = ("tokenizer", "adapter", "base")
PIECES = ("llm", "vision_tower", "eva", "blip2", "qformer")
NAMES = ("device", "dtype", "quantization")

_CALL = re.compile(r"lavish\.load\((\w+(?:, (?:\w+=(?:\.\.\.|'[\w:.-]+')|\.\.\.))+)\)")
_CONFIG = re.compile(r"\bconfig=(\{(?:[^{}]|\{[^{}]*\})*\})")
_PATH = re.compile(rf"\b({'|'.join(PATHS)})=\.\.\.")
_PIECE = re.compile(rf"\b({'|'.join(PIECES)})=\.\.\.")
_NAME = re.compile(rf"\b({'|'.join(NAMES)})=(['\"])([\w:.-]+)\2")


def for_command_line(message: str) -> str:
    """Give a message with options in the place of keyword arguments."""
    message = _CALL.sub(lambda found: "lavish chat " + found[1].replace(", ", " "), message)
    message = _CONFIG.sub(lambda found: f"--config FILE, a JSON or YAML file with {found[1]}", message)
    message = message.replace("config=...", "--config FILE").replace("parallel='tensor'", "--tensor-parallel N")
    message = _PATH.sub(r"--\1 PATH", message)
    message = _PIECE.sub(r"--piece \1=PATH", message)
    return _NAME.sub(r"--\1 \3", message)
