"""The EVA2-CLIP-E vision tower and its gated projector, as CogVLM, CogVLM2 and GLM-4V run it.

Source: THUDM/cogvlm2-llama3-chat-19B, visual.py (read through the copy Niky-san/cogvlm2_surce). Module names are
the released key names. What the families do differently (the 2x2 merge, its width, the final scale) are arguments. Not
here: preprocessing, and what the decoder does with the features.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lavish.common.errors import ConfigError
from lavish.nn.image_steps import ImageStep

PROJECTOR_NORM_EPS = 1e-5  # the release leaves torch's default here; the tower's own norms have 1e-6


class PatchEmbedding(nn.Module):
    """Cut the image into patches, prepend the class row and add the learned positions; no norm, no dropout.

    Shapes: (images, channels, image_size, image_size) -> (images, 1 + patches, hidden): class row, patches.
    """

    def __init__(self, image_size: int, patch_size: int, num_channels: int, hidden_size: int, num_positions: int):
        super().__init__()
        self.proj = nn.Conv2d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, hidden_size))
        self.position_embedding = nn.Embedding(num_positions, hidden_size)
        self.expected_shape = (num_channels, image_size, image_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != self.expected_shape:
            raise ConfigError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}; this tower takes (images, "
                f"{', '.join(map(str, self.expected_shape))}). Make them with the processor of the same checkpoint."
            )
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)  # (images, patches, hidden)
        class_row = self.cls_embedding.expand(patches.shape[0], -1, -1)
        rows = torch.cat((class_row, patches), dim=1)
        # Called, not read: what is offloaded comes when its module is called.
        return rows + self.position_embedding(torch.arange(rows.shape[1], device=rows.device))


class Attention(nn.Module):
    """Full self-attention with one fused projection: rows are q, k, v, each with its heads in order.

    Shapes: (images, rows, hidden) -> the same.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, attn_implementation: str = "sdpa") -> torch.Tensor:
        images, rows, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(images, rows, 3, self.num_heads, -1)
        query, key, value = fused.permute(2, 0, 3, 1, 4)  # each (images, heads, rows, head_dim)
        if attn_implementation == "eager":
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            attended = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
        else:  # no mask, so that no backend ever holds rows x rows (9217^2 in CogVLM2)
            attended = F.scaled_dot_product_attention(query, key, value)
        return self.dense(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears around the exact (erf) GELU; the tanh form moves CogVLM's logits by 5e-3."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class TransformerLayer(GradientCheckpointingLayer):
    """One tower layer. Deviation from the textbook: each norm stands after its sublayer, inside the residual branch."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, layer_norm_eps: float):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = Attention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, intermediate_size)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attn_implementation: str = "sdpa") -> torch.Tensor:
        hidden_states = hidden_states + self.input_layernorm(self.attention(hidden_states, attn_implementation))
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class Transformer(nn.Module):
    """The tower's layers; there is no final norm."""

    def __init__(
        self, num_hidden_layers: int, hidden_size: int, num_heads: int, intermediate_size: int, layer_norm_eps: float
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(hidden_size, num_heads, intermediate_size, layer_norm_eps)
            for _ in range(num_hidden_layers)
        )

    def forward(self, hidden_states: torch.Tensor, attn_implementation: str = "sdpa") -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, attn_implementation)
        return hidden_states


class GatedProjector(nn.Module):
    """Map tower features to the decoder width: linear, norm, GELU, gated MLP.

    Source: CogVLM2 release, visual.py, class GLU.
    Shapes: (images, patches, in_size) -> (images, patches, out_size).
    """

    def __init__(self, in_size: int, out_size: int, intermediate_size: int):
        super().__init__()
        self.linear_proj = nn.Linear(in_size, out_size, bias=False)
        self.norm1 = nn.LayerNorm(out_size, eps=PROJECTOR_NORM_EPS)
        self.dense_h_to_4h = nn.Linear(out_size, intermediate_size, bias=False)
        self.gate_proj = nn.Linear(out_size, intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(intermediate_size, out_size, bias=False)

    def forward(self, vision_hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.gelu(self.norm1(self.linear_proj(vision_hidden_states)))
        gate = F.silu(self.gate_proj(hidden_states))  # (images, patches, intermediate)
        return self.dense_4h_to_h(gate * self.dense_h_to_4h(hidden_states))


class EVA2CLIPModel(nn.Module):
    """Tower, optional 2x2 merge, projector, and the learned rows around the image.

    Args:
        merge_size: width after the 2x2 stride-2 convolution; None has no convolution (CogVLM v1). CogVLM2 merges to the
            tower's own width, GLM-4V to the decoder's.
        out_size: the decoder's width.
        projector_intermediate_size: inner width of the projector's gated MLP.
        scaling_factor: the rows are divided by it at the very end (GLM-4V: 8).
    Shapes: (images, 3, image_size, image_size) -> (images, tokens + 2, out_size): boi, the patches row by row, eoi.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_channels: int,
        num_positions: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        layer_norm_eps: float,
        out_size: int,
        projector_intermediate_size: int,
        merge_size: int | None = None,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.patch_embedding = PatchEmbedding(image_size, patch_size, num_channels, hidden_size, num_positions)
        self.transformer = Transformer(
            num_hidden_layers, hidden_size, num_attention_heads, intermediate_size, layer_norm_eps
        )
        self.linear_proj = GatedProjector(merge_size or hidden_size, out_size, projector_intermediate_size)
        self.conv = nn.Conv2d(hidden_size, merge_size, kernel_size=2, stride=2) if merge_size else None
        self.boi = nn.Parameter(torch.zeros(1, 1, out_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, out_size))
        self.grid_size = image_size // patch_size
        self.scaling_factor = scaling_factor

    def encode(self, pixel_values: torch.Tensor, attn_implementation: str = "sdpa") -> torch.Tensor:
        """Give the patches before the projector: tower, no class row, merged. (images, tokens, merge or hidden)."""
        return self.merge(self.patches(pixel_values, attn_implementation))

    def patches(self, pixel_values: torch.Tensor, attn_implementation: str = "sdpa") -> torch.Tensor:
        """Run the tower alone, and drop the class row. (images, 3, S, S) -> (images, patches, hidden)."""
        return self.transformer(self.patch_embedding(pixel_values), attn_implementation)[:, 1:]

    def merge(self, vision_hidden_states: torch.Tensor) -> torch.Tensor:
        """Merge 2x2 patches, where there is a convolution. (images, patches, hidden) -> (images, tokens, merge)."""
        if self.conv is None:
            return vision_hidden_states
        grid = vision_hidden_states.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        return self.conv(grid).flatten(2).transpose(1, 2)

    def project(self, vision_hidden_states: torch.Tensor) -> torch.Tensor:
        """Project merged patches; boi and eoi go around them. (images, tokens, merge) -> (images, tokens + 2, out)."""
        patches = self.linear_proj(vision_hidden_states)
        boi, eoi = (row.expand(patches.shape[0], -1, -1) for row in (self.boi, self.eoi))
        rows = torch.cat((boi, patches, eoi), dim=1)
        return rows if self.scaling_factor == 1.0 else rows / self.scaling_factor

    def forward(self, pixel_values: torch.Tensor, attn_implementation: str = "sdpa") -> torch.Tensor:
        return self.project(self.encode(pixel_values, attn_implementation))

    def image_steps(self, attn_implementation: str = "sdpa") -> tuple[ImageStep, ...]:
        """Give the steps of `forward`: tower, merge and projector."""

        def tower(pixel_values: torch.Tensor) -> torch.Tensor:
            return self.patches(pixel_values.to(self.boi.device, self.boi.dtype), attn_implementation)

        merge = () if self.conv is None else (ImageStep("merge", (self.conv,), self.merge),)
        return (
            ImageStep("tower", (self.patch_embedding, self.transformer), tower),
            *merge,
            ImageStep("projector", (self.linear_proj, self.boi, self.eoi), self.project),
        )
