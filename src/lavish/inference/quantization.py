"""Weights quantised while they are read: int8 by lavish itself, nf4 by bitsandbytes.

Only linear layers of the decoder are quantised; embedding, head, norms, tower and projector keep their dtype. Each
matrix is read, rounded and let go before the next, so memory peaks at the quantised network plus one matrix. A
network quantised to int8 can be saved and loaded again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lavish.checkpoints.loading import load_into, stored_info
from lavish.checkpoints.rules import Drop, Optional, Rule, plan
from lavish.checkpoints.tensor_map import Assembled, Stored, TensorMap
from lavish.common.errors import ConfigError, MissingDependency, did_you_mean
from lavish.models import family_of
from lavish.nn.int8 import Int8Linear, quantize_weight

logger = logging.getLogger(__name__)

INT8, NF4 = "int8", "nf4"
QUANTIZATIONS = (INT8, NF4)
METHOD = "lavish_int8"
"""`quant_method` in the config of a saved int8 network. transformers does not know it and refuses, instead of reading
int8 as weights."""


def check_quantization(name: str | None, quantize_vision: bool = False) -> None:
    """Check the name of a quantisation, and that what it needs is installed.

    Raises:
        ConfigError: an unknown name, or quantize_vision without one.
        MissingDependency: nf4 without bitsandbytes.
    """
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(
            f"No quantization {name!r}.{did_you_mean(str(name), QUANTIZATIONS)} Known: "
            f"{', '.join(QUANTIZATIONS)}, or None."
        )
    if name == NF4 and find_spec("bitsandbytes") is None:
        raise MissingDependency(
            'quantization="nf4" needs bitsandbytes, which is not installed: pip install bitsandbytes. "int8" '
            "needs nothing."
        )
    if name is None and quantize_vision:
        raise ConfigError('quantize_vision=True needs a quantization: "int8" or "nf4".')


def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Say it where an int8 network spares memory and no time: with float32 activations on a CPU."""
    if device.type == "cpu" and dtype == torch.float32:
        logger.warning(
            'int8 weights with float32 activations spare memory on a CPU, and answers come slower; dtype="bfloat16" is '
            "faster than either."
        )


def quantized_layers(network: nn.Module, *, quantize_vision: bool = False) -> list[str]:
    """Name the linear layers to quantise: those of the decoder's layers, and with `quantize_vision` those of tower and
    projector."""
    family = family_of(network)
    prefixes = (family.decoder_layers, *family.towers) if quantize_vision else (family.decoder_layers,)
    return [
        name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefixes)
    ]


def load_quantized(
    network: PreTrainedModel,
    tensors: TensorMap,
    quantization: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rules: Sequence[Rule] = (),
    quantize_vision: bool = False,
) -> list[str]:
    """Stream a checkpoint of float weights into a network on the meta device, quantising on the way; gives what
    `load_into` gives.

    Raises: as `load_into`, before the first weight is read.
    """
    places = plan(tensors, rules)
    # A dry run: names, shapes and dtypes are checked against the network as it is, and nothing is read.
    load_into(network, tensors, dtype=dtype, device="meta", rules=rules)
    names = quantized_layers(network, quantize_vision=quantize_vision)
    if quantization == NF4:
        names = [name for name in names if _suits_nf4(network.get_submodule(name))]
    make = {INT8: _empty_int8, NF4: _empty_nf4}[quantization]
    for name in names:
        _replace(network, name, make(network.get_submodule(name), dtype))
    weights = [f"{name}.weight" for name in names]
    other_rules = [
        *(Drop(source, why="quantised below") for source in {places.sources[weight] for weight in weights}),
        *(Optional(f"{name}.*", why="quantised below") for name in names),
        *rules,
    ]
    left = load_into(network, tensors, dtype=dtype, device=device, rules=other_rules)
    fill = {INT8: _fill_int8, NF4: _fill_nf4}[quantization]
    for name, weight in _read(tensors, {name: stored_info(tensors, places, f"{name}.weight") for name in names}):
        fill(network.get_submodule(name), weight, dtype, device)
    if quantization == INT8:
        network.config.quantization_config = {"quant_method": METHOD, "quantize_vision": quantize_vision}
    done = {f"{name}.{leaf}" for name in names for leaf in ("weight", "weight_scale")}
    return [name for name in left if name not in done]


def is_saved_int8(config: dict[str, Any]) -> bool:
    """Tell whether a config.json belongs to a network that was saved in int8."""
    saved = config.get("quantization_config")
    return isinstance(saved, dict) and saved.get("quant_method") == METHOD


def replace_by_int8(network: nn.Module, dtype: torch.dtype, *, quantize_vision: bool = False) -> None:
    """Put empty int8 layers into a network on the meta device, for weights that are stored in int8."""
    for name in quantized_layers(network, quantize_vision=quantize_vision):
        _replace(network, name, _empty_int8(network.get_submodule(name), dtype))


def _read(tensors: TensorMap, infos: dict[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the matrices in the order of the files, each as a view that is valid until the next."""
    for file in tensors.files:
        here = [name for name, info in infos.items() if info.file == file]
        mapped = tensors.open(file)
        for name in sorted(here, key=lambda name: infos[name].offset):
            info = infos[name]
            if isinstance(info, Assembled):
                yield name, tensors.assemble(info)
                continue
            yield name, mapped.tensor(info)
            mapped.forget(info)


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, layer)


def _empty_int8(linear: Any, dtype: torch.dtype) -> Int8Linear:
    has_bias = linear.bias is not None
    return Int8Linear(linear.in_features, linear.out_features, has_bias, device="meta", dtype=dtype)


def _fill_int8(layer: Any, weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    # Rounded where it will stay: a GPU does it faster, and the float matrix is let go at once.
    layer.weight, scale = quantize_weight(weight.to(device))
    layer.weight_scale = scale.to(dtype)


def _suits_nf4(linear: Any) -> bool:
    """bitsandbytes packs blocks of 64; every layer of a released model is made of them, those of a toy may not be."""
    return linear.in_features % 64 == 0 and linear.out_features % 64 == 0


def _empty_nf4(linear: Any, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

    has_bias = linear.bias is not None
    return bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
    )


def _fill_nf4(layer: Any, weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

    # Moving the parameter to its device is what quantises it.
    layer.weight = bnb.nn.Params4bit(weight.to(dtype, copy=True), requires_grad=False, quant_type="nf4").to(device)
