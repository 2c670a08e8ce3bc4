"""Saved int8 networks for transformers' `from_pretrained`: without this it would take the int8 numbers for weights."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lavish.common.errors import ConfigError
from lavish.inference.quantization import METHOD, replace_by_int8


class SavedInt8Config(QuantizationConfigMixin):
    """The `quantization_config` of a saved int8 network."""

    def __init__(self, quantize_vision: bool = False, quant_method: str = METHOD):
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]  # an enum of their own methods there
        self.quantize_vision = quantize_vision


class SavedInt8Quantizer(HfQuantizer):  # made with a SavedInt8Config
    """Put int8 layers where the file has int8. Quantising float weights on the way is `lavish.load`'s."""

    quantization_config: SavedInt8Config  # pyright: ignore[reportIncompatibleVariableOverride]
    requires_calibration = True  # their word for: only for weights that are quantised already

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ConfigError(
                'These weights are not in int8 yet; quantise them with lavish.load(..., quantization="int8").'
            )
        replace_by_int8(model, model.config.dtype, quantize_vision=self.quantization_config.quantize_vision)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register_int8() -> None:
    """Make transformers know the method; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(SavedInt8Config)
        register_quantizer(METHOD)(SavedInt8Quantizer)
