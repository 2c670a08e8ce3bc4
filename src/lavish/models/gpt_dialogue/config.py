"""Configuration of GPTDialogue: a GPT-2 whose vocabulary ends with seven special tokens, and the width of a frame.

The fields are GPT-2's, as config.json of `gpt2` spells them; `attribute_map` gives them their standard names. The
special tokens always are the last seven ids, so their ids follow from `vocab_size`.
"""

from transformers import GPT2Config

from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.processors.gpt_processors import SPECIAL_TOKENS

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000
"""The deepest GPT-2 has 48. A config may be a stranger's, and layers cost time before any file is read."""
REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
SIZES = (*REQUIRED, "len_video_ft")


class GPTDialogueConfig(GPT2Config):
    """A GPTDialogue network. The defaults are GPT-2 small's, with the AVSD features of the LAVIS recipe.

    Source: salesforce/LAVIS, lavis/models/gpt_models/gpt_dialogue.py and configs/models/gpt_dialogue_base.yaml.
    Raises: ConfigError where a size is none, or two fields cannot be true together.
    """

    model_type = "gpt_dialogue"

    vocab_size: int = 50257 + len(SPECIAL_TOKENS)
    len_video_ft: int = 4224  # i3d_flow 2048 + i3d_rgb 2048 + vggish 128
    bos_token_id: int | None = None  # None: the place that the last seven ids give it
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        _check_sizes(self)
        ids = self.special_ids
        for name, token in (("bos_token_id", "<bos>"), ("eos_token_id", "<eos>"), ("pad_token_id", "<pad>")):
            if getattr(self, name) is None:
                setattr(self, name, ids[token])
            elif getattr(self, name) != ids[token]:
                raise ConfigError(
                    f"config: {name} is {shown(getattr(self, name))} and {token} is {ids[token]}: the special tokens "
                    f"are the last {len(SPECIAL_TOKENS)} of {self.vocab_size} ids. Correct vocab_size or leave "
                    f"{name} out."
                )
        super().__post_init__(**kwargs)

    @property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token, by its text."""
        first = self.vocab_size - len(SPECIAL_TOKENS)
        return {token: first + place for place, token in enumerate(SPECIAL_TOKENS)}


def _check_sizes(config: GPTDialogueConfig) -> None:
    for name in SIZES:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise ConfigError(f"config: {name} is {shown(value)} and must be a whole number from 1 to {MAX_SIZE}.")
    if config.n_layer > MAX_LAYERS:
        raise ConfigError(f"config: n_layer is {config.n_layer}, over {MAX_LAYERS}.")
    if config.vocab_size <= len(SPECIAL_TOKENS):
        raise ConfigError(
            f"config: vocab_size is {config.vocab_size}; the last {len(SPECIAL_TOKENS)} of them are special tokens."
        )
    if config.n_embd % config.n_head:
        raise ConfigError(f"config: n_embd {config.n_embd} is not divisible by n_head {config.n_head}.")


def read_config(config: dict, where: str, **overrides) -> GPTDialogueConfig:
    """Make the config of a config.json: of a folder that lavish saved, or of the `gpt2` that a run started from.

    A `gpt2` that does not know the special tokens (its bos is not the seventh id from the end) gets seven more ids, as
    LAVIS resized its embedding.

    Args:
        config: the parsed config.json.
        where: the file, for messages.
        overrides: fields to replace, in GPT-2's spelling or standard; unknown ones raise.
    Raises: ConfigError.
    """
    known = {*GPTDialogueConfig.__dataclass_fields__, *GPTDialogueConfig.attribute_map}
    for name in overrides:
        if name not in known:
            raise ConfigError(f"config: {name!r} is no field of GPTDialogueConfig.{did_you_mean(name, known)}")
    given = {GPTDialogueConfig.attribute_map.get(name, name): value for name, value in overrides.items()}
    merged = {**config, **given}
    if absent := [name for name in REQUIRED if name not in merged]:
        raise ConfigError(
            f"{where}: a GPTDialogue config needs {', '.join(REQUIRED)} and lacks {', '.join(absent)}. Give them with "
            "config=..., or name the config.json of the GPT-2 that the run started from."
        )
    if config.get("model_type") == "gpt2":
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name not in given:
                merged.pop(name, None)
        size = config.get("vocab_size")
        is_given = "vocab_size" in given
        if isinstance(size, int) and not is_given and config.get("bos_token_id") != size - len(SPECIAL_TOKENS):
            merged["vocab_size"] = size + len(SPECIAL_TOKENS)
    fields = {name: value for name, value in merged.items() if name not in ("auto_map", "model_type", "architectures")}
    try:
        return GPTDialogueConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
