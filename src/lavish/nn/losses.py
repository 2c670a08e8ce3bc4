"""Losses that several families compute alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lavish.nn.joined_rows import IGNORED, JoinedRows

NO_LOGITS = -1
"""As `logits_to_keep` with labels: the loss is asked for, and no logits."""


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Give the mean next-token cross entropy over the label tokens (batch, seq), which are not -100; 0 without any."""
    targets = labels[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / (targets != IGNORED).sum().clamp(min=1)


def logits_and_loss(
    head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor | None, logits_to_keep: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Run a head, as a transformers `forward` does, and give its logits in float32 and the loss over the labels.

    With `NO_LOGITS` the head runs on the states that a label stands behind, and gives the loss alone: of one picture of
    2,306 tokens and an answer of 100, 4 % of the logits are made.

    Shapes: hidden_states (batch, seq, hidden), labels (batch, seq).
    """
    if labels is None:
        return head(hidden_states[:, -logits_to_keep:]).float(), None
    if logits_to_keep != NO_LOGITS:
        logits = head(hidden_states).float()
        return logits, causal_loss(logits, labels)
    targets = labels[:, 1:]
    is_target = targets != IGNORED
    logits = head(hidden_states[:, :-1][is_target]).float()
    loss = F.cross_entropy(logits, targets[is_target].to(logits.device), reduction="sum")
    return None, loss / max(logits.shape[0], 1)


def joined_loss(
    lm_head: nn.Module, hidden_states: torch.Tensor, rows: JoinedRows, labels: torch.Tensor
) -> torch.Tensor:
    """Give the loss of joined rows: (rows, length, hidden), and the labels of the batch, (batch, seq)."""
    loss = logits_and_loss(lm_head, hidden_states, rows.labels(labels), NO_LOGITS)[1]
    assert loss is not None  # there are labels
    return loss
