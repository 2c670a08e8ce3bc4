"""Make transformers' Auto classes know the families of the table."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from lavish.inference.hf_quantizer import register_int8
from lavish.models import FAMILIES


def register() -> None:
    """Register configs, networks and processors, so that `AutoModelForCausalLM.from_pretrained` and its like load
    folders that lavish saved.

    Calling it again changes nothing; `lavish.load` calls it. A registered class wins over a folder's `auto_map`,
    whatever `trust_remote_code` says. Released CogVLM folders have no `model_type` and load with `lavish.load` only.

    In one case transformers looks at no registration: where tokenizer_config.json has an `auto_map` and no
    `tokenizer_class`, `AutoTokenizer` under `trust_remote_code=True` runs the folder's code. `lavish.load` never does.
    """
    register_int8()
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
