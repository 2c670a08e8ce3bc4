"""A BLIP checkpoint of any kind as the registered model that it is made for: what `lavish.load` calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lavish.checkpoints import lavis
from lavish.checkpoints.json_file import read_optional_object
from lavish.common.errors import UnknownLayout
from lavish.models.blip.samples import MODELS, BlipBase
from lavish.models.blip.weights import architecture_of


def open_model(
    checkpoint: Path, *, config: Any = None, tokenizer: str | Path | PreTrainedTokenizerBase | None = None
) -> BlipBase:
    """Load a LAVIS `.pth` (or the folder that holds one) or a transformers folder of BLIP.

    Raises:
        UnknownLayout: a transformers folder of an architecture that is not BLIP's.
        CheckpointError, ConfigError: as `BlipBase.from_pretrained`.
    """
    named = [] if checkpoint.is_file() else read_optional_object(checkpoint / "config.json").get("architectures") or []
    architecture = named[0] if named else architecture_of(lavis.read(checkpoint), str(checkpoint))
    if architecture not in MODELS:
        raise UnknownLayout(f"{checkpoint}: config.json names {architecture!r}; BLIP's are {', '.join(MODELS)}.")
    return MODELS[architecture].from_pretrained(checkpoint=checkpoint, config=config, tokenizer=tokenizer)
