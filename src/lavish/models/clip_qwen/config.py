"""Configuration of CLIP + Qwen: a CLIP tower, an MLP projector and a Qwen of the first generation.

No release has a config.json of its own: `weights.open_release` makes the fields from the pieces, and what no file
records (tower, image token, prompt) stands in what lavish saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.nn.qwen import QwenConfig
from lavish.nn.qwen_chat import QwenChatConfig
from lavish.processors.pixels import CLIP_MEAN, CLIP_STD

MAX_LAYERS = 1000
"""The deepest part released has 40."""
SYSTEM_PROMPT = "你是一位图像理解助手。"
"""What the release was trained with."""
SIZES = {
    "vision_config": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ),
    "text_config": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}


class ClipQwenConfig(QwenChatConfig):
    """A CLIP + Qwen network. The defaults are those of Qwen-7B-Chat with clip-vit-large-patch14.

    Raises: ConfigError where two fields cannot be true together.
    """

    model_type = "clip_qwen"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig),
        "text_config": SubConfigSpec(config_class=QwenConfig),
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_tower: str | None = None  # name of the tower's folder, for the record
    language_model: str | None = None  # name of the decoder's folder, for the record
    image_token_id: int = 151646  # <|extra_0|>
    num_token_ids: int | None = 151851  # ids that have a text; the rows behind them are padding and never generated
    pad_token_id: int | None = 151643  # <|endoftext|>
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None  # None: <|endoftext|>, <|im_start|>, <|im_end|>, before the image's id
    system_prompt: str = SYSTEM_PROMPT
    max_window_tokens: int = 6144  # of the system prompt and the past turns that a prompt keeps
    repetition_penalty: float = 1.0  # of generated and prompt ids, in greedy answers too; Qwen-7B-Chat says 1.1
    pixel_rule: Literal["training", "webui"] = "training"
    shortest_edge: int | None = None  # in pixels, before the centre crop to the tower's size; None: that size
    image_mean: list[float] | None = None  # None: CLIP's
    image_std: list[float] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.01  # of the projector, as the release starts it

    def __post_init__(self, **kwargs):
        self.vision_config = _part("vision_config", self.vision_config)
        self.text_config = _part("text_config", self.text_config)
        if self.eos_token_id is None:
            self.eos_token_id = [self.image_token_id - 3, self.image_token_id - 2, self.image_token_id - 1]
        for name in ("image_token_id", "max_window_tokens"):
            _check_whole(name, getattr(self, name))
        super().__post_init__(**kwargs)
        self.shortest_edge = cast(int, self.tower.image_size) if self.shortest_edge is None else self.shortest_edge
        self.image_mean = list(CLIP_MEAN) if self.image_mean is None else self.image_mean
        self.image_std = list(CLIP_STD) if self.image_std is None else self.image_std
        self._check()

    def _check(self) -> None:
        tower, text = self.tower, self.text
        for part, config in (("vision_config", tower), ("text_config", text)):
            _check_part(part, config.to_dict())
        _check_whole("shortest_edge", self.shortest_edge)
        if cast(int, self.shortest_edge) < cast(int, tower.image_size):
            raise ConfigError(
                f"config: shortest_edge is {self.shortest_edge} and the tower takes {tower.image_size} pixels: the "
                "crop would be larger than the picture."
            )
        if not isinstance(self.system_prompt, str):
            raise ConfigError(f"config: system_prompt is {shown(self.system_prompt)} and must be a text.")
        penalty = self.repetition_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < 100:
            raise ConfigError(f"config: repetition_penalty is {shown(penalty)} and must be a number above 0.")
        if self.pixel_rule not in ("training", "webui"):
            raise ConfigError(f"config: pixel_rule is {shown(self.pixel_rule)}; it is 'training' or 'webui'.")
        if self.tie_word_embeddings:
            raise ConfigError("config: tie_word_embeddings is True; the family has a head of its own.")
        for name in ("image_token_id", "num_token_ids"):
            value = getattr(self, name)
            if value is not None and value > text.vocab_size:
                raise ConfigError(
                    f"config: {name} is {value} and text_config.vocab_size {text.vocab_size}: the tokenizer has more "
                    "ids than the decoder. Do they belong together?"
                )

    @property
    def tower(self) -> CLIPVisionConfig:
        """`vision_config`, which is a config as soon as this one is made; a SigLIP's has the same names."""
        return cast(CLIPVisionConfig, self.vision_config)

    @property
    def num_image_tokens(self) -> int:
        """Slots of one image: the patches, the class row left out."""
        return (cast(int, self.tower.image_size) // cast(int, self.tower.patch_size)) ** 2


def read_config(config: dict[str, Any], where: str, **overrides: Any) -> ClipQwenConfig:
    """Make the config of a saved config.json, or of the fields of `weights.open_release`.

    Args:
        config: the parsed fields.
        where: the file or folder, for messages.
        overrides: fields to replace; those of a part may be some of them.
    Raises: ConfigError.
    """
    known = set(ClipQwenConfig.__dataclass_fields__)
    if unknown := [key for key in overrides if key not in known]:
        raise ConfigError(f"config: {unknown[0]!r} is no field of ClipQwenConfig.{did_you_mean(unknown[0], known)}")
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    for part in SIZES:
        stored, given = fields.get(part) or {}, overrides.pop(part, None) or {}
        if not isinstance(stored, Mapping) or not isinstance(given, Mapping):
            raise ConfigError(f"{where}: {part} is {shown(given or stored)} and must be an object.")
        fields[part] = {**stored, **given}
        if absent := [name for name in SIZES[part] if name not in fields[part]]:
            raise ConfigError(f"{where}: lacks {part}.{absent[0]}. Fetch the file again, or give it with config=...")
        for name in SIZES[part]:
            _check_whole(f"{part}.{name}", fields[part][name])
        _check_part(part, fields[part])
    try:
        return ClipQwenConfig(**{**fields, **overrides})
    except StrictDataclassError as error:  # transformers' own check of a field's type
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _part(part: str, fields: Any) -> Any:
    """Make the config of a part that no release has: a SigLIP tower, a decoder of transformers. Others are left."""
    model_type = fields.get("model_type") if isinstance(fields, Mapping) else None
    if model_type in (None, CLIPVisionConfig.model_type, QwenConfig.model_type):
        return fields
    known = (SiglipVisionConfig.model_type,) if part == "vision_config" else tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in known:
        raise ConfigError(
            f"config: {part}.model_type is {shown(model_type)}, which no network is made of here."
            f"{did_you_mean(str(model_type), known)} A tower is a CLIP's or a SigLIP's, a decoder one of transformers' "
            "causal language models."
        )
    rest = {name: value for name, value in fields.items() if name != "model_type"}
    if part == "vision_config":
        rest["vision_use_head"] = False  # it pools the patches, which are what the decoder reads
    return CONFIG_MAPPING[model_type](**rest)


def _check_part(part: str, sizes: Mapping[str, Any]) -> None:
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ConfigError(
            f"config: {part}.hidden_size {sizes['hidden_size']} does not divide into {sizes['num_attention_heads']} "
            "heads."
        )
    if part == "text_config" and sizes["hidden_size"] // sizes["num_attention_heads"] % 2:
        raise ConfigError(
            f"config: text_config.hidden_size {sizes['hidden_size']} and {sizes['num_attention_heads']} heads give "
            "heads of an odd width; it must be even, as the rotation pairs the halves of a head."
        )
    if sizes["num_hidden_layers"] > MAX_LAYERS:
        raise ConfigError(f"config: {part}.num_hidden_layers is {sizes['num_hidden_layers']}, over {MAX_LAYERS}.")


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"config: {name} is {shown(value)} and must be a whole number above 0.")
