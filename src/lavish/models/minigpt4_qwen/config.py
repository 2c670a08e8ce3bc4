"""Configuration of MiniGPT4-Qwen: an EVA-ViT, a Q-Former and a Qwen of the first generation.

No release has a config.json of its own: `weights.open_release` makes the fields from the pieces. What follows is what
lavish saves. The vision and Q-Former parts are transformers' Blip2 configs, the decoder's is `nn/qwen.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import Blip2QFormerConfig, Blip2VisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.nn.qwen import QwenConfig
from lavish.nn.qwen_chat import QwenChatConfig

MAX_LAYERS = 1000
"""The deepest part released has 40."""
LN_VISION_EPS = 1e-5
"""Trap: `ln_vision` is a plain torch LayerNorm, while the norms of the blocks have 1e-6."""

SIZES = {
    "vision_config": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ),
    "qformer_config": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "encoder_hidden_size",
        "cross_attention_frequency",
    ),
    "text_config": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}


class MiniGPT4QwenConfig(QwenChatConfig):
    """A MiniGPT4-Qwen or MPP-LLaVA network. The defaults are the 7B release's, apart from its token ids.

    Raises: ConfigError where two fields cannot be true together.
    """

    model_type = "minigpt4_qwen"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=Blip2VisionConfig),
        "qformer_config": SubConfigSpec(config_class=Blip2QFormerConfig),
        "text_config": SubConfigSpec(config_class=QwenConfig),
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32  # slots of one image
    image_size: int | None = None  # side of the pictures in pixels; None: the one that the position table was made for
    image_token_id: int = 151646  # <|extra_0|>
    pad_token_id: int | None = 151643  # <|endoftext|>
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None  # None: <|im_end|> and <|im_start|>, the two ids before the image's
    system_message: str = "You are a helpful assistant."
    max_window_size: int = 6144  # tokens of the system message and the past turns that a prompt keeps
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.eos_token_id is None:
            self.eos_token_id = [self.image_token_id - 1, self.image_token_id - 2]
        for name in ("num_query_tokens", "image_token_id", "max_window_size"):
            _check_whole(name, getattr(self, name))
        super().__post_init__(**kwargs)
        for part, names in SIZES.items():
            for name in names:
                _check_whole(f"{part}.{name}", getattr(getattr(self, part), name))
        if self.image_size is None:
            self.image_size = cast(int, self.vision.image_size)
        _check_whole("image_size", self.image_size)
        self._check_widths()

    def _check_widths(self) -> None:
        vision, qformer, text = self.vision, self.qformer, self.text
        _check("qformer_config.encoder_hidden_size", qformer.encoder_hidden_size, vision.hidden_size, "the tower's")
        _check("qformer_config.use_qformer_text_input", qformer.use_qformer_text_input, False, "queries alone go in")
        _check("tie_word_embeddings", self.tie_word_embeddings, False, "the decoder has a head of its own")
        for name, part in (("vision_config", vision), ("qformer_config", qformer), ("text_config", text)):
            rest = part.hidden_size % part.num_attention_heads
            _check(f"{name}.hidden_size % num_attention_heads", rest, 0, "heads of equal width")
            if part.num_hidden_layers > MAX_LAYERS:
                raise ConfigError(f"config: {name}.num_hidden_layers is {part.num_hidden_layers}, over {MAX_LAYERS}.")
        width = text.hidden_size // text.num_attention_heads
        _check("width of a head of text_config % 2", width % 2, 0, "the rotation pairs the halves of a head")
        for name, size in (("image_size", self.image_size), ("vision_config.image_size", vision.image_size)):
            _check(f"{name} % patch_size", cast(int, size) % cast(int, vision.patch_size), 0, "whole patches")
        if self.image_token_id >= text.vocab_size:
            raise ConfigError(
                f"config: image_token_id is {self.image_token_id} and text_config.vocab_size {text.vocab_size}: the "
                "tokenizer has more ids than the decoder. Do they belong together?"
            )

    @property
    def vision(self) -> Blip2VisionConfig:
        """`vision_config`, which is a config as soon as this one is made."""
        return cast(Blip2VisionConfig, self.vision_config)

    @property
    def qformer(self) -> Blip2QFormerConfig:
        """`qformer_config`, as `vision`."""
        return cast(Blip2QFormerConfig, self.qformer_config)

    @property
    def num_image_tokens(self) -> int:
        """Slots of one image."""
        return self.num_query_tokens


def read_config(config: dict[str, Any], where: str, **overrides: Any) -> MiniGPT4QwenConfig:
    """Make the config of a saved config.json, or of the fields of `weights.open_release`.

    A side of the picture that is given as `vision_config={"image_size": ...}` leaves the position table as it is
    stored: it is resized as the network runs.

    Args:
        config: the parsed fields.
        where: the file or folder, for messages.
        overrides: fields to replace; those of a part may be some of them.
    Raises: ConfigError.
    """
    known = set(MiniGPT4QwenConfig.__dataclass_fields__)
    if unknown := [key for key in overrides if key not in known]:
        raise ConfigError(f"config: {unknown[0]!r} is no field of MiniGPT4QwenConfig.{did_you_mean(unknown[0], known)}")
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    for part in SIZES:
        stored, given = fields.get(part) or {}, overrides.pop(part, None) or {}
        if not isinstance(stored, Mapping) or not isinstance(given, Mapping):
            raise ConfigError(f"{where}: {part} is {shown(given or stored)} and must be an object.")
        if part == "vision_config" and "image_size" in given and "image_size" in stored:
            overrides.setdefault("image_size", given["image_size"])
            given = {key: value for key, value in given.items() if key != "image_size"}
        fields[part] = {**stored, **given}
        if part == "text_config":
            fields[part].pop("layer_types", None)  # derived: one a layer, and the layers may just have been replaced
        if absent := [name for name in SIZES[part] if name not in fields[part]]:
            raise ConfigError(
                f"{where}: the files do not say {part}.{absent[0]}. Give it: "
                f"config={{{part!r}: {{{absent[0]!r}: ...}}}}."
            )
    return MiniGPT4QwenConfig(**{**fields, **overrides})


def _check(name: str, found: object, expected: object, why: str) -> None:
    if found != expected:
        raise ConfigError(f"config: {name} is {found!r} and must be {expected!r} ({why}).")


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"config: {name} is {shown(value)} and must be a whole number above 0.")
