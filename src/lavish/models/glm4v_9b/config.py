"""Configuration of GLM-4V-9B: the released ChatGLMConfig, field by field, and the tower's section.

The fields keep the spelling of the released config.json and the defaults of the released class; `attribute_map` gives
them their standard names. Not here: GLM-4.1V (`glm4v` in transformers), which is another network, and text-only
ChatGLM, which has the same `model_type` and no `vision_config`.
"""

from typing import Any, Literal, cast

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from lavish.common.errors import ConfigError, did_you_mean, shown

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000
"""The deepest part released has 63. A config.json may be a stranger's, and layers cost time before any file is read."""
ROTARY_BASE = 10000.0  # in the released code, not in its config
DTYPES = ("float32", "float16", "bfloat16", "float64")

REQUIRED_VISION = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_heads",
)
SIZES = (
    "num_layers",
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "num_attention_heads",
    "seq_length",
    "multi_query_group_num",
)
RELEASED: dict[str, tuple[Any, str]] = {
    "rmsnorm": (True, "no release has layer norms"),
    "post_layer_norm": (True, "every release ends with a norm"),
    "add_qkv_bias": (True, "every release has it"),
    "multi_query_attention": (True, "every release shares keys and values among heads"),
    "original_rope": (True, "no other rotary was released"),
    "add_bias_linear": (False, "no release has it"),
    "apply_residual_connection_post_layernorm": (False, "no release has it"),
    "fp32_residual_connection": (False, "no release has it"),
    "prefix_projection": (False, "prefix tuning is not supported"),
    "pre_seq_len": (None, "prefix tuning is not supported"),
    "hidden_dropout": (0.0, "the network has no dropout"),
    "attention_dropout": (0.0, "the network has no dropout"),
    "tie_word_embeddings": (False, "the family has a head of its own"),
}
"""What a field must be for a network to be made: what no release uses is refused instead of being ignored."""


class Glm4v9bVisionConfig(PreTrainedConfig):
    """The EVA2-CLIP-E tower. The defaults are the release's."""

    model_type = "glm4v_9b_vision"
    base_config_key = "vision_config"
    attribute_map = {"num_attention_heads": "num_heads", "num_channels": "in_channels"}

    image_size: int = 1120
    patch_size: int = 14
    in_channels: int = 3
    num_positions: int | None = None  # patches + the class row; None: what image_size and patch_size give
    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout_prob: float = 0.0
    scaling_factor: float = 8  # the rows of an image, boi and eoi included, are divided by it
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _check_sizes(self, (*REQUIRED_VISION, "in_channels"), "vision_config.")
        _check_above_zero("vision_config.layer_norm_eps", self.layer_norm_eps)
        _check_above_zero("vision_config.scaling_factor", self.scaling_factor)
        num_positions = (self.image_size // self.patch_size) ** 2 + 1
        if self.num_positions is None:
            self.num_positions = num_positions
        _check("vision_config.num_positions", self.num_positions, num_positions, "(image_size // patch_size)^2 + 1")
        _check("vision_config.hidden_act", self.hidden_act, "gelu", "the exact GELU is the only one released")
        _check("vision_config.hidden_size % num_heads", self.hidden_size % self.num_heads, 0, "heads of equal width")
        _check("vision_config.dropout_prob", self.dropout_prob, 0.0, "this tower has no dropout")
        if self.image_size // self.patch_size < 2:
            raise ConfigError(
                f"config: vision_config.image_size {self.image_size} gives {self.image_size // self.patch_size} "
                f"patches of {self.patch_size} px a side; the 2x2 merge needs two."
            )
        super().__post_init__(**kwargs)

    @property
    def num_merged_patches(self) -> int:
        """Image tokens between boi and eoi: the patches, merged 2 by 2; an odd last row or column is left out."""
        return (self.image_size // self.patch_size // 2) ** 2


class ChatGLMConfig(PreTrainedConfig):
    """A GLM-4V-9B network. The defaults are those of the released class, so most describe no released network.

    Values that no release uses are taken here (the class's own defaults are such) and refused by `check_released`,
    which the network calls.

    Source: configuration_chatglm.py of THUDM/glm-4v-9b, read through huggingface/optimum-habana,
    optimum/habana/transformers/models/glm4v/configuration_chatglm.py.
    Raises: ConfigError where two fields cannot be true together.
    """

    model_type = "chatglm"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
    }
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=Glm4v9bVisionConfig, optional=True)}
    keys_to_ignore_at_inference = ["past_key_values", "rope_deltas"]

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048  # counted in positions: an image takes three of them
    hidden_dropout: float = 0.0
    classifier_dropout: float | None = None
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    bias_dropout_fusion: bool = True  # how the release computes, not what
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    rope_ratio: float = 1  # the rotary base is 10000 times this
    apply_query_key_layer_scaling: bool = True  # without effect: scaled dot product attention does not look at it
    attention_softmax_in_fp32: bool = True  # without effect, as above
    fp32_residual_connection: bool = False
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    original_rope: bool = True  # in the released file, not in its class
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    vision_config: dict | PreTrainedConfig | None = None
    rope: Literal["reference", "float32"] = "reference"

    def __post_init__(self, **kwargs):
        if self.rope not in ("reference", "float32"):
            raise ConfigError(
                f"rope={self.rope!r} was asked; it is 'reference' (a table in the model's dtype) or 'float32'."
            )
        _check_sizes(self, SIZES)
        _check_above_zero("layernorm_epsilon", self.layernorm_epsilon)
        _check_above_zero("rope_ratio", self.rope_ratio)
        _check_token_ids(self)
        heads, groups = self.num_attention_heads, self.multi_query_group_num
        _check("num_attention_heads % multi_query_group_num", heads % groups, 0, "query heads in equal groups")
        _check("kv_channels % 4", self.kv_channels % 4, 0, "half of a head turns, in pairs")
        for name, standard in (("num_layers", "num_hidden_layers"), ("padded_vocab_size", "vocab_size")):
            if standard in kwargs:  # the released file holds both names
                _check(standard, kwargs.pop(standard), getattr(self, name), f"{name} says so")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As transformers', but a text-only ChatGLM is refused."""
        _check_has_vision(config_dict, str(config_dict.get("_name_or_path") or "config.json"))
        return super().from_dict(config_dict, **kwargs)

    @property
    def tower(self) -> Glm4v9bVisionConfig:
        """`vision_config`, which is a config once a dict was given."""
        return cast(Glm4v9bVisionConfig, self.vision_config)

    @property
    def rotary_base(self) -> float:
        """What the rotary frequencies are powers of."""
        return ROTARY_BASE * self.rope_ratio

    @property
    def num_image_tokens(self) -> int:
        """Cache slots of one image: boi, the merged patches, eoi."""
        return self.tower.num_merged_patches + 2

    def to_dict(self):
        """As transformers', without `auto_map`: the code files that it names are never saved, nor run."""
        config = super().to_dict()
        config.pop("auto_map", None)
        return config


def check_released(config: ChatGLMConfig) -> None:
    """Check that a network can be made of a config.

    Raises:
        ConfigError: no vision part (a text-only ChatGLM), or a value that no release of GLM-4V uses.
    """
    if not isinstance(config.vision_config, Glm4v9bVisionConfig):
        _check_has_vision({}, config._name_or_path or "config")
    for name, (expected, why) in RELEASED.items():
        _check(name, getattr(config, name), expected, why)
    for name in ("boi_token_id", "eoi_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            raise ConfigError(f"config: {name} is absent, and the slots of an image are found by it.")
    if config.boi_token_id == config.eoi_token_id:
        raise ConfigError(f"config: boi_token_id and eoi_token_id are both {config.boi_token_id}.")


def _check_has_vision(fields: Any, where: str) -> None:
    if not fields.get("vision_config"):
        raise ConfigError(
            f"{where}: model_type 'chatglm' without a vision_config is a text-only ChatGLM (GLM-4-9B, ChatGLM3). "
            "lavish loads GLM-4V-9B, whose config.json has one; text-only models load with transformers itself."
        )


def _check(name: str, found, expected, why: str) -> None:
    if found != expected:
        raise ConfigError(f"config: {name} is {found!r} and must be {expected!r} ({why}).")


def _check_sizes(config: PreTrainedConfig, names: tuple[str, ...], prefix: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config: {prefix}{name} is {shown(value)} and must be a whole number above 0.")
        if value > MAX_SIZE:
            raise ConfigError(f"config: {prefix}{name} is {shown(value)}, over {MAX_SIZE}.")
    if config.num_hidden_layers > MAX_LAYERS:
        raise ConfigError(f"config: {prefix}num_hidden_layers is {config.num_hidden_layers}, over {MAX_LAYERS}.")


def _check_token_ids(config: "ChatGLMConfig") -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "boi_token_id", "eoi_token_id"):
        value = getattr(config, name)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise ConfigError(f"config: {name} is {shown(value)} and must be a token's number.")
            if not 0 <= token_id < config.padded_vocab_size:
                raise ConfigError(
                    f"config: {name} is {shown(value)}, and the vocabulary has {config.padded_vocab_size} tokens."
                )


def _check_above_zero(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"config: {name} is {value!r} and must be a number above 0.")


def _check_form(config: dict, where: str) -> None:
    """Check what transformers would trip over: sections that are none, and the name of a dtype."""
    for key in ("vision_config", "quantization_config"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise ConfigError(f"{where}: {key} is {shown(config[key])} and must be an object.")
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] not in DTYPES:
            raise ConfigError(f"{where}: {key} is {config[key]!r}; it is one of {', '.join(DTYPES)}.")


def read_config(config: dict, where: str, **overrides) -> ChatGLMConfig:
    """Make the config of a released or saved config.json; a field that is absent has the released class's default.

    Args:
        config: the parsed config.json.
        where: the file, for messages.
        overrides: fields to replace, on-disk spelling or standard; unknown ones raise.
    Raises: ConfigError: a text-only ChatGLM, a size of the tower that is absent, values that no release uses.
    """
    _check_form(config, where)
    _check_has_vision(config, where)
    vision = dict(config["vision_config"])
    absent = [f"vision_config.{key}" for key in REQUIRED_VISION if key not in vision]
    if absent:
        raise ConfigError(
            f"{where}: the tower of a GLM-4V needs {len(REQUIRED_VISION)} sizes and lacks {', '.join(absent)}. Fetch "
            "the config.json of the release again."
        )
    names = ChatGLMConfig.attribute_map
    known = set(ChatGLMConfig.__dataclass_fields__) | set(names)
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise ConfigError(f"config: {unknown[0]!r} is no field of ChatGLMConfig.{did_you_mean(unknown[0], known)}")
    renamed = {names.get(key, key): value for key, value in overrides.items()}
    replaced = {key for key in names if names[key] in renamed}  # the second name of a field that is replaced
    # _name_or_path: the release's is its hub name, where peft would look for it.
    skipped = {"auto_map", "model_type", "_name_or_path", "vision_config", *replaced}
    fields = {key: value for key, value in config.items() if key not in skipped}
    if "vision_config" in renamed:
        _check_form(renamed, "what was given")
        changes = renamed["vision_config"] or {}
        if {"image_size", "patch_size"} & changes.keys():
            vision.pop("num_positions", None)  # follows from them
        renamed["vision_config"] = {**vision, **changes}
    try:
        made = ChatGLMConfig(**{**fields, "vision_config": vision, **renamed})
        check_released(made)
    except ConfigError as error:
        whose = "Give it another value." if renamed else "Correct the file, or fetch that of the release again."
        raise ConfigError(f"{where}: {error} {whose}") from error
    return made
