"""Key and value cache of one request: preallocated, written by slices, cut and grown by this package alone.

A transformers `Cache`, so the network sees nothing special. `update` writes into a preallocated buffer and gives a view
of the filled part: decoding copies nothing, and a single sequence needs no attention mask. All uses of transformers'
cache classes are in this file.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_BLOCK_TOKENS = 256


class SliceLayer(CacheLayerMixin):
    """Keys and values of one decoder layer in a buffer of (batch, heads, capacity, head_dim), filled up to `length`."""

    is_croppable = True

    def __init__(self, capacity: int = _BLOCK_TOKENS):
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, _ = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.capacity, key_states.shape[-1])
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The signature is that of `CacheLayerMixin.update`: `Cache.update(keys, values, layer_idx, *args, **kwargs)`
        # passes on whatever a network gives (static layers take their positions so). This layer needs none of it.
        start, end = self.length, self.length + key_states.shape[-2]
        if end > self.capacity:
            self.reserve(max(end, self.capacity + self.capacity // 2))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers()
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all; what is stored stays."""
        capacity = -(-capacity // _BLOCK_TOKENS) * _BLOCK_TOKENS
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        if self.is_initialized:
            old_keys, old_values = self._buffers()
            self.lazy_initialization(old_keys, old_values)
            keys, values = self._buffers()
            keys[:, :, : self.length] = old_keys[:, :, : self.length]
            values[:, :, : self.length] = old_values[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on; the buffer stays."""
        self.length = min(self.length, length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        keys, values = self._buffers()
        rows = rows.to(keys.device)  # the layers may lie on several
        self.keys, self.values = keys[rows], values[rows]

    def crop(self, tokens_to_remove: int) -> None:
        self.truncate(self.length - tokens_to_remove)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(t.nbytes for t in self._buffers()) if self.is_initialized else 0

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            raise RuntimeError("this cache layer has no tokens yet")
        return self.keys, self.values


class SliceCache(Cache):
    """One `SliceLayer` a decoder layer. `capacity` is in tokens (cache slots) and grows when it is used up."""

    layers: list[SliceLayer]

    def __init__(self, num_layers: int, capacity: int = _BLOCK_TOKENS):
        blocks = -(-capacity // _BLOCK_TOKENS) * _BLOCK_TOKENS
        super().__init__(layers=[SliceLayer(blocks) for _ in range(num_layers)])

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all, in every layer."""
        for layer in self.layers:
            layer.reserve(capacity)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, in every layer: also mends a forward pass that was interrupted between
        two layers.
        """
        for layer in self.layers:
            layer.truncate(length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in every layer."""
        for layer in self.layers:
            layer.select_rows(rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.num_bytes for layer in self.layers)
