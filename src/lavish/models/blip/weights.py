"""Rules from the tensors of LAVIS's BLIP files to the names of transformers, and what a file says of its sizes.

Not here: the networks' own strictness; what no rule drops and the network does not hold is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lavish.checkpoints.rules import Drop, Optional, Rename, Rule, plan
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError

_TOWER = "visual_encoder"
_BLOCK = "visual_encoder.blocks.*"
_LAYER = "vision_model.encoder.layers.*"
_MOMENTUM = "a slow copy of the weights that only pretraining reads"

RULES: tuple[Rule, ...] = (
    Rename(f"{_TOWER}.cls_token", "vision_model.embeddings.class_embedding"),
    Rename(f"{_TOWER}.pos_embed", "vision_model.embeddings.position_embedding"),
    Rename(f"{_TOWER}.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    Rename(f"{_TOWER}.norm.*", "vision_model.post_layernorm.*"),
    Rename(f"{_BLOCK}.norm1.*", f"{_LAYER}.layer_norm1.*"),
    Rename(f"{_BLOCK}.norm2.*", f"{_LAYER}.layer_norm2.*"),
    Rename(f"{_BLOCK}.attn.qkv.*", f"{_LAYER}.self_attn.qkv.*"),
    Rename(f"{_BLOCK}.attn.proj.*", f"{_LAYER}.self_attn.projection.*"),
    Rename(f"{_BLOCK}.mlp.fc1.*", f"{_LAYER}.mlp.fc1.*"),
    Rename(f"{_BLOCK}.mlp.fc2.*", f"{_LAYER}.mlp.fc2.*"),
    Drop("text_decoder.bert.embeddings.position_ids", why="0, 1, 2 ...; the network counts itself"),
    Drop("text_encoder.embeddings.position_ids", why="0, 1, 2 ...; the network counts itself"),
    Drop("temp", why="temperature of the contrastive loss; similarities are given without it"),
    Drop("image_queue", why="negatives of the contrastive loss"),
    Drop("text_queue", why="negatives of the contrastive loss"),
    Drop("idx_queue", why="negatives of the contrastive loss"),
    Drop("queue_ptr", why="where the queues are written next"),
    Drop("ptr_queue", why="where the queues are written next"),
)
"""For a file that holds what its model needs; `rules_for` adds what a pretraining file has besides."""

HEAD = ("itm_head.weight", "itm_head.bias")
_PRETRAINING_ONLY = {
    "BlipForConditionalGeneration": ("text_encoder", "vision_proj", "text_proj", "itm_head"),
    "BlipForQuestionAnswering": ("vision_proj", "text_proj", "itm_head"),
    "BlipForImageTextRetrieval": ("text_decoder",),
}


def rules_for(architecture: str, names: Iterable[str]) -> tuple[Rule, ...]:
    """Give the rules of one network and one file: those above, plus drops of a pretraining file's other parts."""
    others = _PRETRAINING_ONLY[architecture]
    drops: list[Rule] = []
    for name in names:
        module = name.partition(".")[0]
        if module.endswith("_m"):
            drops.append(Drop(name, why=_MOMENTUM))
        elif module in others:
            drops.append(Drop(name, why="another part of the pretrained model"))
    return (*drops, *RULES, *(Optional(name, why="only files of matching have the head") for name in HEAD))


def architecture_of(names: Iterable[str], where: str) -> str:
    """Tell from tensor names which network a file is of.

    Raises:
        CheckpointError: of none.
    """
    modules = {name.partition(".")[0] for name in names}
    if not modules & {"visual_encoder", "vision_model"}:
        raise CheckpointError(
            f"{where}: no BLIP file: it has no visual_encoder; found {', '.join(sorted(modules)[:6])}."
        )
    if "vision_proj" in modules:
        return "BlipForImageTextRetrieval"
    if {"text_encoder", "text_decoder"} <= modules:
        return "BlipForQuestionAnswering"
    if "text_decoder" in modules:
        return "BlipForConditionalGeneration"
    raise CheckpointError(
        f"{where}: a BLIP file without a text_decoder or projections ({', '.join(sorted(modules)[:6])}): retrieval and "
        "NLVR models are not among those that lavish loads."
    )


def stored_sizes(tensors: TensorMap, rules: Iterable[Rule]) -> dict[str, Any]:
    """Read the sizes that a file's shapes tell: all but head counts, epsilons and rates."""
    sources = plan(tensors, tuple(rules)).sources
    shapes = {target: tensors.info(source).shape for target, source in sources.items()}
    text = "text_decoder.bert" if "text_decoder.bert.embeddings.word_embeddings.weight" in shapes else "text_encoder"
    read = _Shapes(shapes)
    patch = read.size("vision_model.embeddings.patch_embedding.weight", -1)
    grid = round((read.size("vision_model.embeddings.position_embedding", 1) - 1) ** 0.5)
    sizes: dict[str, Any] = {
        "vision_config": {
            "image_size": grid * patch,
            "patch_size": patch,
            "hidden_size": read.size("vision_model.embeddings.class_embedding", -1),
            "intermediate_size": read.size("vision_model.encoder.layers.0.mlp.fc1.weight", 0),
            "num_hidden_layers": read.count(r"vision_model\.encoder\.layers\.(\d+)\..*"),
        },
        "text_config": {
            "vocab_size": read.size(f"{text}.embeddings.word_embeddings.weight", 0),
            "hidden_size": read.size(f"{text}.embeddings.word_embeddings.weight", 1),
            "max_position_embeddings": read.size(f"{text}.embeddings.position_embeddings.weight", 0),
            "intermediate_size": read.size(f"{text}.encoder.layer.0.intermediate.dense.weight", 0),
            "num_hidden_layers": read.count(rf"{re.escape(text)}\.encoder\.layer\.(\d+)\..*"),
            "encoder_hidden_size": read.size(f"{text}.encoder.layer.0.crossattention.self.key.weight", 1),
        },
    }
    if "vision_proj.weight" in shapes:
        sizes["image_text_hidden_size"] = read.size("vision_proj.weight", 0)
    # What a damaged file does not tell stays with the config, and the strict check names it.
    for section in ("vision_config", "text_config"):
        sizes[section] = {name: size for name, size in sizes[section].items() if size}
    return sizes


class _Shapes:
    """Sizes of tensors by name; 0 where there is no such tensor."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def size(self, name: str, dim: int) -> int:
        shape = self.shapes.get(name, ())
        return shape[dim] if -len(shape) <= dim < len(shape) else 0

    def count(self, pattern: str) -> int:
        found = [int(match[1]) for name in self.shapes if (match := re.fullmatch(pattern, name))]
        return max(found, default=-1) + 1


def complete(network: Any, absent: Iterable[str] = ()) -> None:
    """Make what no file holds: the count of the text positions; and take the matching head out where it is absent.

    Raises:
        CheckpointError: a tensor that cannot be computed.
    """
    for name in absent:
        if name in HEAD:
            network.itm_head = None
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise CheckpointError(f"{name!r} is in no file and cannot be computed. Fetch the checkpoint again.")
        module = network.get_submodule(owner)
        size = module.position_embeddings.num_embeddings
        module.position_ids = torch.arange(size, device=module.word_embeddings.weight.device).expand((1, -1))
