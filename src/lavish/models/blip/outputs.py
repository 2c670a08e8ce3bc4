"""What BLIP's registered models give, under LAVIS's names.

Source: salesforce/LAVIS, lavis/models/blip_models/blip_outputs.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class BlipIntermediateOutput(ModelOutput):
    """What a loss was computed from."""

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    encoder_output: torch.Tensor | None = None
    decoder_output: Any = None
    decoder_labels: torch.Tensor | None = None


@dataclass
class BlipOutput(ModelOutput):
    """A training step: `loss` is minimised; the others are its parts."""

    loss: torch.Tensor | None = None
    loss_lm: torch.Tensor | None = None
    intermediate_output: BlipIntermediateOutput | None = None


@dataclass
class BlipOutputFeatures(ModelOutput):
    """Features: (batch, patches + 1 or seq, hidden), those that end in `_proj` (..., embed_dim) of length 1."""

    image_embeds: torch.Tensor | None = None
    image_embeds_proj: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    text_embeds_proj: torch.Tensor | None = None
    multimodal_embeds: torch.Tensor | None = None
