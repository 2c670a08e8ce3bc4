"""The section `model` of a MiniGPT4-Qwen recipe: our keys, and those of MPP-LLaVA's own YAMLs.

A YAML of the release is read as it is: what its keys mean here is taken over, what nothing is here but the value that
every YAML of the release has is let pass, and another value is refused with what to write instead.
Source: Coobiw/MPP-LLaVA, lavis/models/minigpt4qwen_models/minigpt4qwen.py (from_config), lavis/projects/**.yaml.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavish.checkpoints.download import cache_folder, is_url
from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.models.minigpt4_qwen.config import MiniGPT4QwenConfig
from lavish.models.minigpt4_qwen.weights import PIECES

logger = logging.getLogger(__name__)

RANDOM_PROJECTOR = "random_projector"
FREEZES = ("freeze_vit", "freeze_qformer", "freeze_queries", "freeze_proj", "freeze_llm", "unfreeze_pos_embed")
KEYS = (
    *("arch", "model_type", "finetuned", "load_finetuned", "init", "max_txt_len", "llm_device_map"),
    "use_grad_checkpoint",
    *PIECES,
    *FREEZES,
)
"""What a section may hold beside the fields of the config."""
RENAMED = {"llm_model": "llm", "pretrained": "blip2", "num_query_token": "num_query_tokens"}
"""The release's name -> ours."""
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "vit_model": (("eva_clip_g",), "no other tower was released; leave it out"),
    "drop_path_rate": ((0,), "the tower drops no blocks; leave it out"),
    "qformer_text_input": ((False,), "the question does not pass the Q-Former, nor can it in the release"),
    "load_pretrained": ((True,), "tower and Q-Former are in files; a network that is all random is arch: chat's"),
    "get_lora": (
        (False,),
        "a LoRA is trained by arch: chat, with model.lora: {r: 8, alpha: 32, dropout: 0.05, target_modules: [q_proj, "
        "v_proj]}; in the release those layers do not exist",
    ),
    "vit_precision": (("fp16", "fp32"), "what is frozen has the decoder's dtype, what learns is float32; leave it out"),
    "autocast_dtype": (("bfloat16",), "run.amp: true computes in bfloat16"),
    "enable_autocast": ((True, False), "run.amp decides"),
    "apply_lemmatizer": ((False,), "answers are left as they are"),
    "prompt": (("", None), "what stands around a question is said by its data set"),
}
"""The release's key -> the values that change nothing here, and what to do instead of another."""
OF_LORA = ("lora_alpha", "lora_r", "lora_dropout")
"""Of a LoRA that `get_lora: false` leaves out."""


def read_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """Give a section in our keys.

    Raises:
        ConfigError: an unknown key, two names of one key that say different things, or a value that has no meaning
            here.
    """
    known = {*KEYS, *MiniGPT4QwenConfig.__dataclass_fields__}
    theirs = {*RENAMED, *FIXED, *OF_LORA}
    found: dict[str, Any] = {}
    for name, value in section.items():
        if name in FIXED:
            accepted, instead = FIXED[name]
            if value not in accepted:
                said = " or ".join(shown(one) for one in accepted)
                raise ConfigError(f"model.{name} is {shown(value)}, and only {said} has a meaning here: {instead}.")
        elif name not in known | theirs:
            hint = did_you_mean(name, known | theirs)
            raise ConfigError(f"model: {name!r} is no key of this model.{hint}")
        elif name in known:
            found[name] = value
    for name, ours in RENAMED.items():
        # The default YAML of the model type names pieces under our names: the release's own name is the later word.
        if section.get(name):
            found[ours] = _placed(section[name]) if isinstance(section[name], str) else section[name]
    if not isinstance(found.get("use_grad_checkpoint", False), bool):
        raise ConfigError(f"model.use_grad_checkpoint is {shown(found['use_grad_checkpoint'])}; it is true or false.")
    return found


def _placed(place: str) -> str:
    """Give where a piece is: as it is written, or below the cache, which the release takes for the root."""
    below = cache_folder() / place
    return str(below) if not Path(place).exists() and not is_url(place) and below.exists() else place


def starts_random(section: Mapping[str, Any], checkpoint: Any) -> bool:
    """Tell whether the projector starts random: `init: random_projector`, or the release's `load_finetuned: false`.

    Raises:
        ConfigError: it was asked for, and weights were given too; or another `init`.
    """
    init = section.get("init")
    if init not in (None, RANDOM_PROJECTOR):
        raise ConfigError(
            f"model.init is {shown(init)}; of this model it is {RANDOM_PROJECTOR!r}, a projector that has yet to learn."
            " A network that is all random is arch: chat with init: random."
        )
    if init is None and (section.get("load_finetuned") is not False or checkpoint is not None):
        return False
    if init is not None and (given := checkpoint or section.get("finetuned")):
        raise ConfigError(
            f"model.init is {init!r}, and {shown(str(given))}, which holds a trained projector, was given; leave one "
            "out."
        )
    if section.get("freeze_proj"):
        raise ConfigError("The projector starts random and freeze_proj is true: nothing would make sense of a picture.")
    logger.warning("The projector starts with random weights, as %s asks.", "init" if init else "load_finetuned: false")
    return True
