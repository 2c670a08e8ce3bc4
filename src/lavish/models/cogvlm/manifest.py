"""The tensors that a CogVLM config asks for: names, shapes and parts, counted without torch or transformers.

`lavish inspect` compares it with the headers of a checkpoint in milliseconds; a test holds it against the network
itself and against the released lists at full size. How to make a network of it is in model.py, not here.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import ConfigError, MissingKeys, ShapeMismatch, UnexpectedKeys, did_you_mean, shown

LANGUAGE, IMAGE, TOWER, PROJECTOR, EMBEDDINGS, HEAD, NORMS = (
    "language experts",
    "image experts",
    "vision tower",
    "projector",
    "embeddings",
    "head",
    "norms, rotary table",
)
PARTS = (EMBEDDINGS, LANGUAGE, IMAGE, NORMS, TOWER, PROJECTOR, HEAD)
"""What a network consists of, in the order in which a prompt passes it."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_multi_query_heads",
    "max_position_embeddings",
)
VISION_SIZES = (
    "image_size",
    "patch_size",
    "in_channels",
    "num_positions",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_heads",
)
VIDEO_ARCHITECTURE = "CogVLMVideoForCausalLM"
VIDEO_FRAMES = 24
"""Frames of a video, in the released demo; no config.json says it."""
MAX_LAYERS = 1000
"""The deepest part released has 63. A config.json may be a stranger's, and layers cost time before any file is read."""
OPTIONAL_SIZES = {"num_multi_query_heads": None, "max_position_embeddings": 2048}
OPTIONAL_VISION_SIZES = {"in_channels": 3, "num_positions": None}
STANDARD_NAMES = {"num_key_value_heads": "num_multi_query_heads"}
STANDARD_VISION_NAMES = {"num_attention_heads": "num_heads", "num_channels": "in_channels"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the network. `is_linear`: the matrix of a linear layer. `is_optional`: computed if absent."""

    name: str
    shape: tuple[int, ...]
    part: str
    is_linear: bool = False
    is_optional: bool = False


@dataclass(frozen=True)
class Sizes:
    """The sizes of a config.json that decide how large everything is; `vision_*` are the tower's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_multi_query_heads: int | None
    max_position_embeddings: int
    vision: dict[str, int]
    is_video: bool = False
    """CogVLM2-Video: frames go through the language experts, and there are no image experts."""

    @property
    def version(self) -> int:
        """1 or 2, as the config tells it."""
        return 1 if self.num_multi_query_heads is None else 2

    @property
    def head_dim(self) -> int:
        """Width of a head of the decoder."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values; in v1 as many as of queries."""
        return self.num_multi_query_heads or self.num_attention_heads

    @property
    def num_patches(self) -> int:
        """Patches that the tower sees; v2 merges four of them into one token afterwards."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Cache slots of one image, boi and eoi included."""
        grid = self.vision["image_size"] // self.vision["patch_size"]
        return (grid if self.version == 1 else grid // 2) ** 2 + 2


def read_sizes(fields: Mapping[str, Any], where: str, overrides: Mapping[str, Any] | None = None) -> Sizes:
    """Take the sizes out of the fields of a config.json; `overrides` (nested) replace them, standard names allowed.

    Raises:
        ConfigError: a size is absent or no whole number, or an override is no size.
    """
    vision = fields.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ConfigError(f"{where}: vision_config is absent. Fetch the config.json of the release again.")
    replaced = dict(overrides or {})
    vision_changes = _known(replaced.pop("vision_config", {}), VISION_SIZES, STANDARD_VISION_NAMES)
    changes = _known(replaced, SIZES, STANDARD_NAMES)
    vision, merged = {**vision, **vision_changes}, {**fields, **changes}
    try:
        sizes = {name: _size(merged, name, OPTIONAL_SIZES) for name in SIZES}
        tower = {name: _size(vision, name, OPTIONAL_VISION_SIZES, "vision_config.") for name in VISION_SIZES}
    except ConfigError as error:
        given = dotted_names({**changes, "vision_config": vision_changes})
        raise ConfigError(f"{where}: {error} {advice(str(error), given)}") from error
    if tower["num_positions"] is None:
        tower["num_positions"] = (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    return Sizes(**sizes, vision=tower, is_video=max_frames(fields) is not None)


def max_frames(fields: Mapping[str, Any]) -> int | None:
    """Give how many frames a model of this config.json sees, or None: it sees pictures. By the released architecture,
    or by the field that lavish writes.
    """
    architectures = fields.get("architectures") or []
    is_released = VIDEO_ARCHITECTURE in (architectures if isinstance(architectures, list) else [architectures])
    return fields.get("max_frames", VIDEO_FRAMES if is_released else None)


def _known(overrides: Any, names: tuple[str, ...], standard: Mapping[str, str]) -> dict[str, Any]:
    """Give the overrides by their names on disk."""
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"vision_config is {overrides!r} and must be fields: vision_config.num_hidden_layers=2.")
    found = {standard.get(name, name): value for name, value in overrides.items()}
    for name in found:
        if name not in names:
            known = (*names, *standard)
            raise ConfigError(
                f"{name!r} is no size of this network.{did_you_mean(name, known)} Sizes: {', '.join(known)}."
            )
    return found


def advice(problem: str, given: Iterable[str]) -> str:
    """Say what to do about a problem: change the fields that a caller gave, if it names one of them, else the file."""
    words = set(re.findall(r"\w+", problem))
    ours = [name for name in given if name.rpartition(".")[2] in words]
    if ours:
        return f"Give {' and '.join(ours)} another value: what was given replaces the config.json's."
    return "Correct the config.json, or fetch that of the release again."


def dotted_names(overrides: Mapping[str, Any]) -> list[str]:
    """Give the names of the fields that nested overrides replace: `vision_config.num_heads`."""
    names = []
    for name, value in overrides.items():
        names += [f"{name}.{inner}" for inner in value] if isinstance(value, Mapping) else [name]
    return names


def _size(fields: Mapping[str, Any], name: str, optional: Mapping[str, Any], prefix: str = "") -> Any:
    value = fields.get(name, optional.get(name))
    if value is None and name in optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "absent" if name not in fields else shown(value)
        raise ConfigError(f"{prefix}{name} is {found} and must be a whole number above 0.")
    if name == "num_hidden_layers" and value > MAX_LAYERS:
        raise ConfigError(f"{prefix}{name} is {shown(value)}, over {MAX_LAYERS}.")
    return value


def version_problem(version: int, names: Container[str]) -> str | None:
    """Say that a config and the stored tensors are of different versions, which one field of the config decides."""
    is_merged = "model.vision.conv.weight" in names
    if version == 1 and is_merged:
        return (
            "config.json has no num_multi_query_heads and is read as CogVLM v1, but model.vision.conv.weight is "
            "CogVLM2's. Set num_multi_query_heads (8 in the released CogVLM2), or fetch config.json again."
        )
    has_bias = "model.layers.0.self_attn.vision_expert_query_key_value.bias" in names
    if version == 2 and "model.vision.boi" in names and not is_merged and not has_bias:
        return (
            "config.json has num_multi_query_heads and is read as CogVLM2, but model.vision.conv.weight and the biases "
            "that every CogVLM2 has are absent. If it is a CogVLM v1, take num_multi_query_heads out of config.json."
        )
    return None


def tensors(sizes: Sizes) -> Iterator[Tensor]:
    """Give every tensor of the network, in the order of the network."""
    hidden = sizes.hidden_size
    yield Tensor("model.embed_tokens.weight", (sizes.vocab_size, hidden), EMBEDDINGS)
    for index in range(sizes.num_hidden_layers):
        yield from _layer(sizes, f"model.layers.{index}")
    yield Tensor("model.norm.weight", (hidden,), NORMS)
    yield from _vision(sizes)
    yield Tensor("lm_head.weight", (sizes.vocab_size, hidden), HEAD)


def _layer(sizes: Sizes, prefix: str) -> Iterator[Tensor]:
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    fused = hidden + 2 * sizes.num_key_value_heads * sizes.head_dim  # query, key and value rows in one matrix
    yield Tensor(f"{prefix}.self_attn.rotary_emb.inv_freq", (sizes.head_dim // 2,), NORMS, is_optional=True)
    experts = (("language", LANGUAGE),) if sizes.is_video else (("vision", IMAGE), ("language", LANGUAGE))
    for expert, part in experts:
        attention = f"{prefix}.self_attn.{expert}_expert"
        yield Tensor(f"{attention}_query_key_value.weight", (fused, hidden), part, is_linear=True)
        if expert == "vision" and sizes.version == 2:
            yield Tensor(f"{attention}_query_key_value.bias", (fused,), part)
        yield Tensor(f"{attention}_dense.weight", (hidden, hidden), part, is_linear=True)
    for expert, part in reversed(experts):
        mlp = f"{prefix}.mlp.{expert}_mlp"
        yield Tensor(f"{mlp}.gate_proj.weight", (inner, hidden), part, is_linear=True)
        yield Tensor(f"{mlp}.up_proj.weight", (inner, hidden), part, is_linear=True)
        yield Tensor(f"{mlp}.down_proj.weight", (hidden, inner), part, is_linear=True)
    yield Tensor(f"{prefix}.input_layernorm.weight", (hidden,), NORMS)
    yield Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,), NORMS)


def _vision(sizes: Sizes) -> Iterator[Tensor]:
    width, patch, prefix = sizes.vision["hidden_size"], sizes.vision["patch_size"], "model.vision"
    yield Tensor(f"{prefix}.boi", (1, 1, sizes.hidden_size), PROJECTOR)
    yield Tensor(f"{prefix}.eoi", (1, 1, sizes.hidden_size), PROJECTOR)
    yield Tensor(f"{prefix}.patch_embedding.cls_embedding", (1, width), TOWER)
    yield Tensor(f"{prefix}.patch_embedding.proj.weight", (width, sizes.vision["in_channels"], patch, patch), TOWER)
    yield Tensor(f"{prefix}.patch_embedding.proj.bias", (width,), TOWER)
    positions = (sizes.vision["num_positions"], width)
    yield Tensor(f"{prefix}.patch_embedding.position_embedding.weight", positions, TOWER)
    for index in range(sizes.vision["num_hidden_layers"]):
        yield from _tower_layer(sizes, f"{prefix}.transformer.layers.{index}")
    yield from _projector(sizes, f"{prefix}.linear_proj")
    if sizes.version == 2:
        yield Tensor(f"{prefix}.conv.weight", (width, width, 2, 2), PROJECTOR)
        yield Tensor(f"{prefix}.conv.bias", (width,), PROJECTOR)


def _tower_layer(sizes: Sizes, prefix: str) -> Iterator[Tensor]:
    width, inner = sizes.vision["hidden_size"], sizes.vision["intermediate_size"]
    for name, rows, columns in (
        ("attention.query_key_value", 3 * width, width),
        ("attention.dense", width, width),
        ("mlp.fc1", inner, width),
        ("mlp.fc2", width, inner),
    ):
        yield Tensor(f"{prefix}.{name}.weight", (rows, columns), TOWER, is_linear=True)
        yield Tensor(f"{prefix}.{name}.bias", (rows,), TOWER)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Tensor(f"{prefix}.{name}.weight", (width,), TOWER)
        yield Tensor(f"{prefix}.{name}.bias", (width,), TOWER)


def _projector(sizes: Sizes, prefix: str) -> Iterator[Tensor]:
    hidden, inner, width = sizes.hidden_size, sizes.intermediate_size, sizes.vision["hidden_size"]
    yield Tensor(f"{prefix}.linear_proj.weight", (hidden, width), PROJECTOR, is_linear=True)
    yield Tensor(f"{prefix}.norm1.weight", (hidden,), PROJECTOR)
    yield Tensor(f"{prefix}.norm1.bias", (hidden,), PROJECTOR)
    yield Tensor(f"{prefix}.dense_h_to_4h.weight", (inner, hidden), PROJECTOR, is_linear=True)
    yield Tensor(f"{prefix}.gate_proj.weight", (inner, hidden), PROJECTOR, is_linear=True)
    yield Tensor(f"{prefix}.dense_4h_to_h.weight", (hidden, inner), PROJECTOR, is_linear=True)


def check_tensors(sizes: Sizes, stored: TensorMap, model: str, layout: str) -> None:
    """Hold names and shapes against the config's, before they are written in another layout.

    Raises:
        MissingKeys, UnexpectedKeys, ShapeMismatch: they differ; `model` and `layout` are what the message calls them.
    """
    expected = {tensor.name: tensor for tensor in tensors(sizes)}
    missing = [name for name, tensor in expected.items() if name not in stored and not tensor.is_optional]
    unexpected = [name for name in stored if name not in expected]
    if missing:
        raise MissingKeys(
            f"{stored.path}: {len(missing)} of {len(expected)} tensors of a {model} of this config are absent, first "
            f"{missing[0]!r}.{stored.shards_sentence()}"
        )
    if unexpected:
        raise UnexpectedKeys(
            f"{stored.path}: {len(unexpected)} tensors have no place in {layout}, first {unexpected[0]!r}."
            f"{did_you_mean(unexpected[0], expected)}"
        )
    for name, tensor in expected.items():
        if name in stored and stored.info(name).shape != tensor.shape:
            raise ShapeMismatch(
                f"{stored.path}: {name!r} is {stored.info(name).shape}, and {tensor.shape} by the config."
            )
