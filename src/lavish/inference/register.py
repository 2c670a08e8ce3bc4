"""Make transformers' Auto classes know the families of the table."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto import tokenization_auto

from lavish.inference.hf_quantizer import register_int8
from lavish.models import FAMILIES


def register() -> None:
    """Register configs, networks and processors, so that `AutoModelForCausalLM.from_pretrained` and its like load
    folders that lavish saved.

    Calling it again changes nothing; `lavish.load` calls it. A registered class wins over a folder's `auto_map`,
    whatever `trust_remote_code` says. Released CogVLM folders have no `model_type` and load with `lavish.load` only.
    """
    register_int8()
    _name_our_tokenizers()
    for family in FAMILIES:
        if family.opener is not None:  # no chat network; transformers knows BLIP itself
            continue
        config, model = family.config_class, family.model_class
        AutoConfig.register(family.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoModelForImageTextToText.register(config, model, exist_ok=True)
        if family.tokenizer_class is not None:
            # By the name that tokenizer_config.json asks for, so not under the family's own config: with
            # trust_remote_code=True transformers prefers a folder's code to what is registered for its config.
            key = config.sub_configs.get("vision_config", config)
            AutoTokenizer.register(key, tokenizer_class=family.tokenizer_class, exist_ok=True)
        AutoProcessor.register(config, family.processor_class, exist_ok=True)


def _name_our_tokenizers() -> None:
    """Let `AutoTokenizer` find our class in a folder that names it in `auto_map` alone.

    Without a `tokenizer_class` transformers runs the folder's code under trust_remote_code=True, or asks whether it
    may, whatever is registered.
    """
    read = tokenization_auto.get_tokenizer_config
    if getattr(read, "by_lavish", False):
        return

    def get_tokenizer_config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        fields = read(*args, **kwargs)
        remote = fields.get("auto_map")
        classes = remote.get("AutoTokenizer") if isinstance(remote, dict) else remote
        if fields.get("tokenizer_class") is None and isinstance(classes, list | tuple):
            named = {str(path).rpartition(".")[2] for path in classes}
            ours = {row.tokenizer.partition(":")[2] for row in FAMILIES if row.tokenizer is not None}
            if known := named & ours:
                fields["tokenizer_class"] = known.pop()
        return fields

    get_tokenizer_config.by_lavish = True  # pyright: ignore[reportFunctionMemberAccess]
    tokenization_auto.get_tokenizer_config = get_tokenizer_config
