"""Conversations of a batch one behind the other in fewer rows: what was padding is used, and nothing else changes.

A row of a batch is as long as its longest conversation. Here shorter ones share a row, up to that length; a mask lets
each token see only those before it in its own conversation, and every conversation keeps the positions that it had. So
the network computes the same for each token, but for the order of sums. In which rows they stand: the longest first,
each in the first row that has room.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED = -100


@dataclass(frozen=True)
class JoinedRows:
    """Where each token of a batch went. `index` (rows, length) counts the tokens of the batch, row after row."""

    index: torch.Tensor
    segments: torch.Tensor
    """(rows, length): which conversation a token is of; -1 on padding."""
    is_first: torch.Tensor
    """(rows, length): the first token of each conversation, which nothing predicts."""

    @classmethod
    def of(cls, attention_mask: torch.Tensor) -> JoinedRows:
        """Join the rows of a batch that is padded on the right. (batch, seq), 1 on real tokens."""
        lengths = attention_mask.sum(1).tolist()
        seq, rows = attention_mask.shape[1], first_fit(lengths)
        index = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        segments, is_first = torch.full_like(index, -1), torch.zeros_like(index, dtype=torch.bool)
        for at, row in enumerate(rows):
            start = 0
            for one in row:
                end = start + lengths[one]
                index[at, start:end] = torch.arange(one * seq, one * seq + lengths[one])
                segments[at, start:end] = one
                is_first[at, start] = True
                start = end
        device = attention_mask.device
        return cls(index.to(device), segments.to(device), is_first.to(device))

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """Move what belongs to tokens. (batch, seq, ...) -> (rows, length, ...); padding holds some other token's."""
        return rows.flatten(0, 1)[self.index]

    @property
    def mask(self) -> torch.Tensor:
        """What each token sees: the tokens of its conversation up to itself. Boolean, (rows, 1, length, length)."""
        length = self.index.shape[1]
        is_own = self.segments[:, :, None] == self.segments[:, None, :]  # padding sees padding: no NaN on any backend
        causal = torch.ones(length, length, dtype=torch.bool, device=self.index.device).tril()
        return (is_own & causal)[:, None]

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Move labels; a conversation's first token and padding are not learnt. (batch, seq) -> (rows, length)."""
        return self.join(labels).masked_fill(self.is_first | (self.segments < 0), IGNORED)


def first_fit(lengths: list[int]) -> list[list[int]]:
    """Put numbers into as few rows as the longest first, first row with room gives; a row holds the longest one."""
    rows: list[list[int]] = []
    room: list[int] = []
    for one in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        at = next((at for at, left in enumerate(room) if left >= lengths[one]), None)
        if at is None:
            at = len(rows)
            rows.append([])
            room.append(max(lengths))
        rows[at].append(one)
        room[at] -= lengths[one]
    return rows
