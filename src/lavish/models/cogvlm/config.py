"""Configuration of CogVLM (v1), CogVLM2 and CogVLM2-Video: told apart by `num_multi_query_heads` and `max_frames`.

The fields keep the spelling of the released config.json; `attribute_map` gives them their standard names. The release
has no `model_type` and keeps the rotary base in its code, so both are filled in here.
"""

from typing import Literal, cast

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.models.cogvlm.manifest import (
    MAX_LAYERS,
    OPTIONAL_SIZES,
    OPTIONAL_VISION_SIZES,
    SIZES,
    VISION_SIZES,
    advice,
    dotted_names,
    max_frames,
)

MAX_SIZE = 2**31 - 1
"""Far above any size that was built, and what a dimension of a tensor holds."""
ROPE_THETA = {1: 10000.0, 2: 500000.0}  # in the released code, not in its config


class CogVLMVisionConfig(PreTrainedConfig):
    """The EVA2-CLIP-E tower. The defaults are CogVLM2's."""

    model_type = "cogvlm_vision"
    base_config_key = "vision_config"
    attribute_map = {"num_attention_heads": "num_heads", "num_channels": "in_channels"}

    image_size: int = 1344
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
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _check_sizes(self, VISION_SIZES, "vision_config.", may_be_none="num_positions")
        _check_above_zero("vision_config.layer_norm_eps", self.layer_norm_eps)
        num_positions = self.num_patches + 1
        if self.num_positions is None:
            self.num_positions = num_positions
        _check("vision_config.num_positions", self.num_positions, num_positions, "(image_size // patch_size)^2 + 1")
        _check("vision_config.hidden_act", self.hidden_act, "gelu", "the exact GELU is the only one released")
        _check("vision_config.hidden_size % num_heads", self.hidden_size % self.num_heads, 0, "heads of equal width")
        _check("vision_config.dropout_prob", self.dropout_prob, 0.0, "this tower has no dropout")
        super().__post_init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """Patches of one image, the class row not counted."""
        return (self.image_size // self.patch_size) ** 2


class CogVLMConfig(PreTrainedConfig):
    """A CogVLM network. The defaults are CogVLM v1's decoder; `num_multi_query_heads` makes it a CogVLM2.

    Source: config.json of THUDM/cogvlm-chat-hf and of THUDM/cogvlm2-llama3-chat-19B.
    Raises: ConfigError where two fields cannot be true together.
    """

    model_type = "cogvlm"
    attribute_map = {"num_key_value_heads": "num_multi_query_heads"}
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=CogVLMVisionConfig)}
    keys_to_ignore_at_inference = ["past_key_values", "rope_deltas"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_multi_query_heads: int | None = None  # key/value heads; given (even if equal to the heads): CogVLM2
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048  # counted in cache slots: an image takes num_image_tokens of them
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    template_version: Literal["base", "chat", "vqa", "inst"] = "chat"
    vision_config: dict | PreTrainedConfig | None = None
    rope_theta: float | None = None  # None: 10000 in v1, 500000 in v2
    rope: Literal["reference", "float32"] = "reference"
    max_frames: int | None = None  # of a video; given: CogVLM2-Video, which has no image experts

    def __post_init__(self, **kwargs):
        if self.rope not in ("reference", "float32"):
            raise ConfigError(f"rope={self.rope!r} was asked; it is 'reference' (the stored inv_freq) or 'float32'.")
        _check_sizes(self, SIZES, may_be_none="num_multi_query_heads")
        _check_sizes(self, ("max_frames",), may_be_none="max_frames")
        if self.is_video:
            _check("CogVLM version", self.version, 2, "max_frames makes it a CogVLM2-Video")
        _check_above_zero("rms_norm_eps", self.rms_norm_eps)
        if self.rope_theta is not None:
            _check_above_zero("rope_theta", self.rope_theta)
        _check("hidden_act", self.hidden_act, "silu", "no other was released")
        _check_token_ids(self)
        _check("tie_word_embeddings", self.tie_word_embeddings, False, "the family has a head of its own")
        heads, key_value_heads = self.num_attention_heads, self.num_multi_query_heads or self.num_attention_heads
        _check("hidden_size % num_attention_heads", self.hidden_size % heads, 0, "heads of equal width")
        _check("num_attention_heads % num_multi_query_heads", heads % key_value_heads, 0, "query heads in equal groups")
        _check("head width % 2", self.head_dim % 2, 0, "the rotary halves are equal")
        if self.rope_theta is None:
            self.rope_theta = ROPE_THETA[self.version]
        super().__post_init__(**kwargs)

    @property
    def version(self) -> int:
        """1 or 2. By the config alone: 1226 positions do not tell it (cogvlm-base-224 has 257 and is v1)."""
        return 1 if self.num_multi_query_heads is None else 2

    @property
    def is_video(self) -> bool:
        """CogVLM2-Video: frames go through the language experts, and there are no others."""
        return self.max_frames is not None

    @property
    def tower(self) -> CogVLMVisionConfig:
        """`vision_config`, which is a config as soon as this one is made."""
        return cast(CogVLMVisionConfig, self.vision_config)

    @property
    def rotary_base(self) -> float:
        """`rope_theta`, or the version's own where a caller set it to None."""
        return float(self.rope_theta or ROPE_THETA[self.version])

    @property
    def head_dim(self) -> int:
        """Width of a head of the decoder."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_image_tokens(self) -> int:
        """Cache slots of one image: boi, the (in v2 merged) patches, eoi."""
        grid = self.tower.image_size // self.tower.patch_size
        return (grid if self.version == 1 else grid // 2) ** 2 + 2

    def to_dict(self):
        """As transformers', without `auto_map`: the code files that it names are never saved, nor run."""
        config = super().to_dict()
        config.pop("auto_map", None)
        return config


def _check(name: str, found, expected, why: str) -> None:
    if found != expected:
        raise ConfigError(f"config: {name} is {found!r} and must be {expected!r} ({why}).")


def _check_sizes(config: PreTrainedConfig, names: tuple[str, ...], prefix: str = "", *, may_be_none: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None and name == may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config: {prefix}{name} is {shown(value)} and must be a whole number above 0.")
        if value > MAX_SIZE:
            raise ConfigError(f"config: {prefix}{name} is {shown(value)}, over {MAX_SIZE}.")
    num_layers = config.num_hidden_layers
    if num_layers > MAX_LAYERS:
        raise ConfigError(f"config: {prefix}num_hidden_layers is {num_layers}, over {MAX_LAYERS}.")


def _check_token_ids(config: "CogVLMConfig") -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int)):
                raise ConfigError(f"config: {name} is {shown(value)} and must be a token's number.")


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


DTYPES = ("float32", "float16", "bfloat16", "float64")
REQUIRED = (*(name for name in SIZES if name not in OPTIONAL_SIZES), "vision_config")
REQUIRED_VISION = tuple(name for name in VISION_SIZES if name not in OPTIONAL_VISION_SIZES)


def _check_present(config: dict, vision: dict, given: dict, where: str) -> None:
    """Check that the config and what a caller gave say every size together."""
    given_vision = given.get("vision_config")
    named = {**vision, **given_vision} if isinstance(given_vision, dict) else vision
    absent = [key for key in REQUIRED if key not in config and key not in given]
    has_vision = "vision_config" in config or "vision_config" in given
    absent += [f"vision_config.{key}" for key in REQUIRED_VISION if has_vision and key not in named]
    if absent:
        raise ConfigError(
            f"{where}: a CogVLM config needs {len(REQUIRED) + len(REQUIRED_VISION)} sizes and lacks "
            f"{', '.join(absent)}. Fetch the config.json of the release again, or give them: config=..."
        )


def read_overrides(given: dict) -> dict:
    """Give what a caller's config says: fields, a whole config.json, or a YAML of MindFormers.

    Raises: ConfigError.
    """
    if isinstance(given.get("model"), dict):
        from lavish.models.cogvlm.mindformers import read_recipe  # only people who come from there need it

        rest = {name: value for name, value in given.items() if name == "rope"}
        return {**read_recipe(given, "config=...").fields, **rest}
    if not given.get("architectures"):
        return given
    known = {*CogVLMConfig.__dataclass_fields__, *CogVLMConfig.attribute_map} - {"model_type", "dtype"}
    return {**{name: value for name, value in given.items() if name in known}, "max_frames": max_frames(given)}


def read_config(config: dict, where: str, **overrides) -> CogVLMConfig:
    """Make the config of a released or saved config.json; a size that is absent raises instead of taking a default.

    Args:
        config: the parsed config.json.
        where: the file, for messages.
        overrides: fields to replace, on-disk spelling or standard; unknown ones raise.
    Raises: ConfigError.
    """
    _check_form(config, where)
    overrides = read_overrides(overrides)
    known = set(CogVLMConfig.__dataclass_fields__) | set(CogVLMConfig.attribute_map)
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise ConfigError(f"config: {unknown[0]!r} is no field of CogVLMConfig.{did_you_mean(unknown[0], known)}")
    renamed = {str(CogVLMConfig.attribute_map.get(key, key)): value for key, value in overrides.items()}
    vision = dict(config.get("vision_config") or {})
    _check_present(config, vision, renamed, where)
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "vision_config")}
    fields["max_frames"] = max_frames(config)
    given = dotted_names(renamed)
    if "vision_config" in renamed:
        _check_form(renamed, "what was given")
        wanted = renamed["vision_config"] or {}
        if not wanted.keys().isdisjoint(("image_size", "patch_size")):
            wanted = {"num_positions": None, **wanted}  # follows from them
        renamed["vision_config"] = {**vision, **wanted}
    try:
        return CogVLMConfig(**{**fields, "vision_config": vision, **renamed})
    except ConfigError as error:
        raise ConfigError(f"{error} {advice(str(error), given)}") from error
