"""Decoding of one sequence with fixed shapes and addresses: what a compiled step and a CUDA graph need.

The cache has its full size from the start and the step looks at all of it under a mask, so every step is the same
program; nothing is allocated, and the host waits for the device only where it reads the token. `steps.py` is the
flexible way (batches, growing caches, no compilation), and the faster one where Python is not what a step waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from lavish.common.errors import PromptError
from lavish.inference.steps import CogVLMSteps, Prompt
from lavish.models.cogvlm.model import CogVLMForCausalLM, DecoderLayer

_BLOCK_SLOTS = 64
"""The cache is made in whole blocks, since kernels read masks in aligned pieces."""
_WARM_UPS = 3
"""Runs before a graph is recorded: libraries choose their kernels and allocate in the first ones."""


class StaticStep:
    """Prefill and decode of a single sequence in a cache of `capacity` slots.

    Args:
        network: on one device.
        capacity: tokens of prompt and answer together, image slots included.
        is_compiled: compile the step with `torch.compile` (a minute at the first token; needs a C++ compiler on a CPU).
        is_graphed: record the step as a CUDA graph; None: on CUDA.
    """

    def __init__(
        self,
        network: CogVLMForCausalLM,
        capacity: int,
        *,
        is_compiled: bool = False,
        is_graphed: bool | None = None,
    ):
        self.steps = CogVLMSteps(network)
        self.capacity = capacity
        self.length = 0
        device, config = self.steps.device, network.config
        # Made outside of inference mode: the compiled step writes to it, and may not write to inference tensors.
        slots = -(-capacity // _BLOCK_SLOTS) * _BLOCK_SLOTS
        self.cache = StaticCache(config=config, max_cache_len=slots)
        first = cast(DecoderLayer, network.model.layers[0])
        self.cache.early_initialization(
            1,
            first.self_attn.num_key_value_heads,  # under tensor parallelism a share of the config's
            config.head_dim,
            network.lm_head.weight.dtype,
            device,
        )
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = self._step
        if is_compiled:
            self._forward = torch.compile(self._step, fullgraph=True, dynamic=False)
        self._is_graphed = device.type == "cuda" if is_graphed is None else is_graphed
        self._recorded: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None

    def prefill(self, prompt: Prompt, features: torch.Tensor | None = None) -> torch.Tensor:
        """Start anew with a prompt. Shapes: features (1, slots, hidden) -> logits (1, vocab).

        Raises:
            PromptError: the prompt is longer than the cache.
        """
        if len(prompt) > self.capacity:
            raise PromptError(
                f"The prompt has {len(prompt)} tokens, image slots included, and this step was made for "
                f"{self.capacity}. Make a StaticStep with a larger capacity."
            )
        self.cache.reset()
        logits, state = self.steps.prefill([prompt], features, self.cache)
        self._position.copy_(state.positions)
        self.length = len(prompt)
        return logits

    @torch.no_grad()
    def decode(self, token_id: int | torch.Tensor) -> torch.Tensor:
        """Feed one token. Shapes: -> logits (1, vocab), overwritten by the next call where the step is a graph.

        Raises:
            PromptError: the cache is full.
        """
        if self.length >= self.capacity:
            raise PromptError(
                f"All {self.capacity} slots of this step's cache are used. Make it with a larger capacity."
            )
        self.length += 1
        if isinstance(token_id, torch.Tensor):
            self._token.copy_(token_id.view(1, 1))
        else:
            self._token.fill_(token_id)
        if not self._is_graphed:
            return self._run()
        graph, logits = self._recorded or self._record()
        graph.replay()
        return logits

    def _run(self) -> torch.Tensor:
        logits = self._forward(self._token, self._position)
        self._position.add_(1)
        return logits

    def _step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        network = self.steps.network
        hidden_states = network.model(
            inputs_embeds=network.model.embed_tokens(token),
            position_ids=position,
            routing=self.steps.text_only,
            past_key_values=self.cache,
        )
        return network.lm_head(hidden_states[:, -1]).float()

    def _record(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Record the step as a graph. The runs before it write the slot that the first replay writes again: the
        counters are put back after each."""
        layers = cast(list[StaticLayer], self.cache.layers)  # CogVLM has no layers of another kind
        counters = [self._position, *(layer.cumulative_length for layer in layers)]
        before = [counter.clone() for counter in counters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
                for counter, value in zip(counters, before, strict=True):
                    counter.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run()
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        self._recorded = graph, logits
        return self._recorded
