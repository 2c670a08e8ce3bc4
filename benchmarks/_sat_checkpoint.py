"""A CogVLM v1 of any size in SAT's layout, random: what the benchmarks of conversion read."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import torch

from lavish.checkpoints import sat
from lavish.checkpoints.output import Output, TargetPlan, TensorFile, write_plan
from lavish.checkpoints.rules import plan
from lavish.checkpoints.torch_file import TorchZipFormat
from lavish.models.cogvlm import manifest
from lavish.models.cogvlm.sat import INV_FREQ, TO_SAT, sat_fields

DRAWN = 1 << 22
WIDTHS = (4096, 2048, 1024, 512, 128)
"""Of the decoder: the largest of which several layers fit."""


def fields_for(num_bytes: int) -> dict[str, object]:
    """Give the config of a CogVLM v1 of about so many bytes in half precision: the release's widths where they fit."""
    for hidden_size in WIDTHS:
        fields = {
            "architectures": ["CogVLMForCausalLM"],
            "vocab_size": 32000 if hidden_size > 512 else 2000,
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 43 // 16 // 8 * 8,
            "num_hidden_layers": 1,
            "num_attention_heads": hidden_size // 64,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "template_version": "chat",
            "vision_config": {
                "image_size": 224,
                "patch_size": 14,
                "in_channels": 3,
                "num_positions": 257,
                "hidden_size": hidden_size // 2,
                "intermediate_size": hidden_size * 2,
                "num_hidden_layers": 2,
                "num_heads": 8,
                "layer_norm_eps": 1e-6,
                "hidden_act": "gelu",
            },
        }
        one = _bytes_of(fields)
        layer = _bytes_of({**fields, "num_hidden_layers": 2}) - one
        if one + layer <= num_bytes or hidden_size == WIDTHS[-1]:
            return {**fields, "num_hidden_layers": max(1, 1 + round((num_bytes - one) / layer))}
    raise AssertionError  # the loop ends with the last width


def write_sat(folder: Path, fields: dict[str, object], dtype: str) -> int:
    """Write it to a folder that is not there yet; gives the bytes of its tensors."""
    names = {tensor.name: tensor.shape for tensor in manifest.tensors(manifest.read_sizes(fields, "benchmark"))}
    later = {INV_FREQ.replace("*", str(index)) for index in range(1, int(str(fields["num_hidden_layers"])))}
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(getattr(torch, dtype))
    outputs = tuple(
        Output(target, names[source], dtype, partial(_repeated, drawn, names[source]))
        for target, source in plan([name for name in names if name not in later], TO_SAT).sources.items()
    )
    file = TensorFile(f"1/{sat.RANK_FILE.format(0)}", outputs, partial(TorchZipFormat, sat.WEIGHTS))
    texts = {sat.CONFIG: json.dumps(sat_fields(fields, "benchmark")).encode(), sat.LATEST: b"1"}
    made = TargetPlan((file,), texts)
    write_plan(made, folder, identity={"benchmark": str(fields)})
    return made.nbytes


def _bytes_of(fields: dict[str, object]) -> int:
    sizes = manifest.read_sizes(fields, "benchmark")
    return 2 * sum(math.prod(tensor.shape) for tensor in manifest.tensors(sizes))


def _repeated(drawn: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(shape)
