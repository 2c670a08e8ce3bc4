"""Make transformers' Auto classes know the families of the table."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from lavish.inference.hf_quantizer import register_int8
from lavish.models import FAMILIES
from lavish.processors.tokenizers import SentencePieceTokenizer


def register() -> None:
    """Register configs, networks and processors, so that `AutoModelForCausalLM.from_pretrained` and its like load
    folders that lavish saved.

    Calling it again changes nothing; `lavish.load` calls it. A registered class wins over a folder's `auto_map`,
    whatever `trust_remote_code` says. Released CogVLM folders have no `model_type` and load with `lavish.load` only.
    """
    register_int8()
    for family in FAMILIES:
        config, model = family.config_class, family.model_class
        AutoConfig.register(family.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoModelForImageTextToText.register(config, model, exist_ok=True)
        # By name, for folders whose tokenizer_config.json says it: transformers' own readers of sentencepiece differ.
        AutoTokenizer.register(config, tokenizer_class=SentencePieceTokenizer, exist_ok=True)
        AutoProcessor.register(config, family.processor_class, exist_ok=True)
