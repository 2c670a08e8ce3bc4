"""Losses that several families compute alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Give the mean next-token cross entropy over the label tokens (batch, seq), which are not -100; 0 without any."""
    targets = labels[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss / (targets != -100).sum().clamp(min=1)
