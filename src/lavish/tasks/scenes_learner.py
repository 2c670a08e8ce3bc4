"""What the pocket model is trained with besides itself: dense read-outs of the tower, and a code that stands in for it.

Stages, each a run of its own (see `scenes.py`). `tower`: the vision tower alone, on dense labels of the drawing
(what stands under each patch). `decoder`: merge, projector and decoder alone, on text, with the tower replaced by a
fixed linear code of the true labels: binding is learnt without waiting for perception, and at no tower cost. The tower
stage also learns to give that code, so the two halves meet. `text`: all but the tower, on text, with the tower's own
output. `joint`: everything, on text, with the dense labels kept as an auxiliary loss.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lavish.common.errors import ConfigError
from lavish.datasets.scenes.dataset import IGNORED, packed_attention_mask
from lavish.datasets.scenes.tokenizer import COORDINATE_BASE
from lavish.datasets.scenes.world import GRID
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM, ExpertRouting
from lavish.nn.eva2_clip import EVA2CLIPModel, TransformerLayer
from lavish.processors.pixels import CLIP_MEAN, CLIP_STD

CLASSES = {"shape": 7, "colour": 8, "size": 4, "digit": 11, "digit_index": 5, "number_length": 5, "background": 4}
BOXES = ("box", "number_box")
BOX_FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
CODE_SIZE = sum(CLASSES.values()) + len(BOXES) * 4 * 2 * len(BOX_FREQUENCIES)
CODE_GAIN = 4.0
CODE_DROPOUT = 0.05  # share of patches that the noisy code shows as empty
STAGES = ("tower", "decoder", "text", "joint")


def label_code(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Encode the dense labels of each patch: one-hot classes, and sines and cosines of the box edges.

    Shapes: classes (batch, patches) int64, boxes (batch, patches, 4) -> (batch, patches, CODE_SIZE).
    """
    parts = [F.one_hot(labels[name], size).float() for name, size in CLASSES.items()]
    for name in BOXES:
        box = labels[name]  # (batch, patches, 4), zeros where there is none
        present = (box.abs().sum(-1, keepdim=True) > 0).float()
        for frequency in BOX_FREQUENCIES:
            angle = 2 * math.pi * frequency * box
            parts += [0.7 * present * angle.sin(), 0.7 * present * angle.cos()]
    return torch.cat(parts, dim=-1)


class DenseHeads(nn.Module):
    """Linear read-outs of the tower: a class head per label and one head for the box edges."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.classes = nn.ModuleDict({name: nn.Linear(hidden_size, size) for name, size in CLASSES.items()})
        self.boxes = nn.ModuleDict({name: nn.Linear(hidden_size, 4) for name in BOXES})

    def forward(self, vision_hidden_states: torch.Tensor, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give the losses by label, and as `right_*` the shares of right classes on labelled patches.

        Half of a class loss is its mean over all patches, half that over the labelled ones (class above 0), which are
        few.
        """
        out: dict[str, torch.Tensor] = {}
        for name, head in self.classes.items():
            logits, target = head(vision_hidden_states).flatten(0, 1).float(), labels[name].flatten()
            losses = F.cross_entropy(logits, target, reduction="none")
            labelled = (target > 0).float()
            num_labelled = labelled.sum().clamp(min=1)
            on_labelled = (losses * labelled).sum() / num_labelled
            out[f"loss_{name}"] = 0.5 * losses.mean() + 0.5 * on_labelled
            out[f"right_{name}"] = ((logits.argmax(-1) == target).float() * labelled).sum().detach() / num_labelled
        for name, head in self.boxes.items():
            target = labels[name]
            present = (target.abs().sum(-1, keepdim=True) > 0).float()
            error = (head(vision_hidden_states).float() - target).abs() * present
            out[f"loss_{name}"] = error.sum() / present.sum().clamp(min=1)
        return out


class SceneLearner(nn.Module):
    """The network with what only training needs: dense heads and the fixed code that stands in for the tower.

    Args:
        network: a CogVLM2-shaped one, whose tower is at least CODE_SIZE wide.
        stage: one of STAGES; it decides what is frozen and which losses there are.
        dense_weight: weight of the dense losses in the joint stage.
        code_noise: standard deviation of the noise on the code in the decoder stage.
        coordinate_spread: standard deviation of the bell that is a coordinate's target, in thousandths; 0: none.

    Raises:
        ConfigError: a network of another shape.
    """

    code_basis: torch.Tensor

    def __init__(
        self,
        network: CogVLMForCausalLM,
        stage: str,
        dense_weight: float = 0.1,
        code_noise: float = 0.3,
        coordinate_spread: float = 0.0,
    ):
        super().__init__()
        self.network, self.stage = network, stage
        self.dense_weight, self.code_noise, self.coordinate_spread = dense_weight, code_noise, coordinate_spread
        width = network.config.tower.hidden_size
        check_shape(network.config)
        self.heads = DenseHeads(width)
        basis = torch.linalg.qr(torch.randn(width, CODE_SIZE, generator=torch.Generator().manual_seed(0)))[0]
        self.register_buffer("code_basis", CODE_GAIN * basis.T.contiguous())  # (CODE_SIZE, width)
        self._freeze()

    def _freeze(self) -> None:
        tower = [
            *self.network.model.vision.patch_embedding.parameters(),
            *self.network.model.vision.transformer.parameters(),
        ]
        if self.stage == "tower":
            self.network.requires_grad_(False)
            for parameter in tower:
                parameter.requires_grad_(True)
        elif self.stage in ("decoder", "text"):
            self.heads.requires_grad_(False)
            for parameter in tower:
                parameter.requires_grad_(False)

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Give `loss` and its named parts. Samples: what `SceneDataset.collater` makes."""
        losses: dict[str, torch.Tensor] = {}
        code = label_code(samples)
        dense_loss = code.new_zeros(())
        if self.stage == "decoder":
            vision_hidden_states = self._noisy_code(code)
        elif self.stage == "text":
            with torch.no_grad():
                vision_hidden_states = self._tower(normalise(samples["pictures"]))
        else:
            vision_hidden_states = self._tower(normalise(samples["pictures"]))
            dense = self.heads(vision_hidden_states, samples)
            losses.update(dense)
            losses["loss_code"] = F.mse_loss(vision_hidden_states.float(), code @ self.code_basis)
            dense_loss = losses["loss_code"] + sum(value for name, value in dense.items() if name.startswith("loss_"))
        if self.stage == "tower":
            return {"loss": dense_loss, **losses}
        text_loss, right = self._text_loss(vision_hidden_states, samples)
        losses["loss_text"], losses["right_text"] = text_loss, right
        losses["loss"] = text_loss + self.dense_weight * dense_loss
        return losses

    def _tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the tower alone, without its class row. Shape: (batch, patches, width)."""
        vision = self.network.model.vision
        return vision.transformer(vision.patch_embedding(pixel_values))[:, 1:]

    def _project(self, vision_hidden_states: torch.Tensor) -> torch.Tensor:
        """Merge and project tower rows. Shapes: (batch, patches, width) -> (batch, boi + tokens + eoi, hidden)."""
        vision = self.network.model.vision
        grid = vision_hidden_states.transpose(1, 2).unflatten(2, (vision.grid_size, vision.grid_size))
        merged = grid if vision.conv is None else vision.conv(grid)
        patches = vision.linear_proj(merged.flatten(2).transpose(1, 2))
        boi, eoi = (row.expand(len(patches), -1, -1).to(patches.dtype) for row in (vision.boi, vision.eoi))
        return torch.cat((boi, patches, eoi), dim=1)

    def _noisy_code(self, code: torch.Tensor) -> torch.Tensor:
        """Blur the true code as a tower that errs would: Gaussian noise everywhere, and some patches shown as empty."""
        dropped = torch.rand(code.shape[:2], device=code.device)[..., None] < CODE_DROPOUT
        vision_hidden_states = code.masked_fill(dropped, 0.0) @ self.code_basis
        return vision_hidden_states + self.code_noise * torch.randn_like(vision_hidden_states)

    def _text_loss(
        self, vision_hidden_states: torch.Tensor, samples: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the weighted mean loss of the answer tokens, and the share of them that the network puts first."""
        model = self.network.model
        image_features = self._project(vision_hidden_states)
        inputs_embeds = model.embed(samples["input_ids"], samples["token_type_ids"], image_features)
        hidden_states = model(
            inputs_embeds=inputs_embeds,
            position_ids=samples["position_ids"],
            attention_mask=packed_attention_mask(samples["segment_ids"], samples["sees_image"]),
            routing=ExpertRouting.from_token_type_ids(samples["token_type_ids"]),
        )
        learnt = samples["targets"] != IGNORED
        logits = self.network.lm_head(hidden_states[learnt]).float()
        targets = samples["targets"][learnt]
        right = (logits.argmax(-1) == targets).float().mean()
        weights = samples["target_weights"][learnt]
        losses = spread_cross_entropy(logits, targets, self.coordinate_spread) * weights
        return losses.sum() / weights.sum(), right.detach()


def spread_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, spread: float) -> torch.Tensor:
    """Cross entropy of each token, where a coordinate token's target is a bell over the values near it.

    Boxes are right when they overlap well, so a coordinate that is nearly right is worth more than one that is far off.
    Only values that boxes can have, cell borders of the drawing, are in the bell.
    Shapes: (tokens, vocab), (tokens,) -> (tokens,).
    """
    losses = F.cross_entropy(logits, targets, reduction="none")
    values = targets - COORDINATE_BASE
    is_coordinate = ((values >= 0) & (values < 1000)).nonzero().flatten()
    if spread <= 0 or not len(is_coordinate):
        return losses
    possible = torch.tensor(
        sorted({min(round(1000 * cell / GRID), 999) for cell in range(GRID + 1)}), device=logits.device
    )
    bell = (-((possible[None] - values[is_coordinate, None]) ** 2) / (2 * spread**2)).softmax(dim=1)
    scores = logits[is_coordinate].log_softmax(dim=1)[:, COORDINATE_BASE + possible]
    return losses.index_copy(0, is_coordinate, -(bell * scores).sum(dim=1))


def check_shape(config: CogVLMConfig) -> None:
    """Refuse a network that the stages cannot train.

    Raises:
        ConfigError: a v1 decoder, or a tower that is narrower than the code.
    """
    if config.version != 2:
        raise ConfigError(
            "The scenes task trains a CogVLM2-shaped network, and the recipe's has no num_multi_query_heads; give it."
        )
    if config.tower.hidden_size < CODE_SIZE:
        raise ConfigError(
            f"vision_config.hidden_size is {config.tower.hidden_size}; the code that stands in for the tower needs at "
            f"least {CODE_SIZE}."
        )


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Turn pictures into pixel values as the processor does: scaled to 0..1, then CLIP mean and standard deviation.

    Shapes: (batch, height, width, 3) uint8 -> (batch, 3, height, width) float32.
    """
    mean = torch.tensor(CLIP_MEAN, device=pictures.device)
    std = torch.tensor(CLIP_STD, device=pictures.device)
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def initialise(network: CogVLMForCausalLM, coordinate_base: int, num_coordinates: int = 1000) -> None:
    """Draw the starting weights so that little data goes far.

    Matrices 1/sqrt(fan_in); smooth embeddings of the coordinate tokens (near values start near); and a tower whose
    patches start out attending to near and similar ones: sines of row and column as positions, keys that equal queries
    (Trockman and Kolter 2023).

    Args:
        coordinate_base: id of the first of `num_coordinates` coordinate tokens.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2 and "position_embedding" not in name and "embed_tokens" not in name:
            fan_in = parameter[0].numel()
            nn.init.trunc_normal_(parameter, std=fan_in**-0.5)
    nn.init.normal_(network.model.embed_tokens.weight, std=0.5)
    value = torch.arange(num_coordinates)[:, None] / num_coordinates
    width = network.config.hidden_size
    frequency = 0.5 * 2 ** (torch.arange(width // 4) / (width // 4) * 6)
    waves = torch.cat([(2 * math.pi * frequency * value).sin(), (2 * math.pi * frequency * value).cos()], dim=1)
    with torch.no_grad():
        rows = slice(coordinate_base, coordinate_base + num_coordinates)
        network.model.embed_tokens.weight[rows, : waves.shape[1]] = 0.7 * waves
        network.lm_head.weight[rows, : waves.shape[1]] = 0.1 * waves
        _initialise_tower(network.model.vision)


def _initialise_tower(vision: EVA2CLIPModel) -> None:
    position = vision.patch_embedding.position_embedding.weight  # (1 + patches, width), class row first
    grid, num_waves = vision.grid_size, position.shape[1] // 4
    period = 4 * 14 ** (torch.arange(num_waves) / (num_waves - 1))  # 4 .. 56 patches
    angle = 2 * math.pi * torch.arange(grid)[:, None] / period
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)  # (grid, width / 2)
    by_row, by_column = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    position.zero_()
    position[1:, : 4 * num_waves] = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)
    for layer in vision.transformer.layers:
        attention = cast(TransformerLayer, layer).attention
        query, key, _ = attention.query_key_value.weight.chunk(3)
        query.mul_(0.7)
        key.copy_(query)
