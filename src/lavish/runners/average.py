"""A running mean of the trained weights (EMA), for validation and as the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lavish.runners.engines import Engine


class WeightAverage:
    """Keeps `mean = decay * mean + (1 - decay) * weight` of each trained weight, in float32 at least.

    Early on the decay is smaller, min(decay, (1 + updates) / (10 + updates)), so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.mean: dict[str, torch.Tensor] = {}

    def start(self) -> None:
        """Begin at the weights as they are."""
        self.mean = {
            name: weight.detach().clone().to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of a step in."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, weight in self._weights.items():
            self.mean[name].lerp_(weight.detach().to(self.mean[name].dtype), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the means where the weights are, for a while."""
        weights = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.put_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(weights[name])

    @torch.no_grad()
    def put_in(self) -> None:
        """Put the means where the weights are."""
        for name, weight in self._weights.items():
            weight.copy_(self.mean[name])

    def state(self, engine: Engine) -> dict[str, Any]:
        """Give the means, whole, for a checkpoint; all processes call it."""
        mean = {name: engine.full(tensor).cpu() for name, tensor in self.mean.items()}
        return {"mean": mean, "num_updates": self.num_updates}

    @torch.no_grad()
    def load(self, state: dict[str, Any] | None, engine: Engine) -> None:
        """Go on from the means of a checkpoint; one that has none begins at its weights."""
        self.start()
        if state is not None:
            self.num_updates = state["num_updates"]
            for name, tensor in state["mean"].items():
                self.mean[name].copy_(engine.share(tensor, self.mean[name]))
