"""The tiny CogVLM2 of MindFormers for the tests: its files, a tokenizer of its size, what MindFormers made of it."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import torch

from lavish.checkpoints import hf
from lavish.checkpoints.output import TargetPlan, TensorFile, data_of
from lavish.checkpoints.tensor_map import TensorInfo, TensorMap

FIXTURE = Path(__file__).parent / "fixtures" / "mindspore_ckpt"
OPEN = FIXTURE / "open"
HF, MS, CARDS = OPEN / "checkpoint" / "hf", OPEN / "checkpoint" / "ms", OPEN / "checkpoint" / "ms_2cards"
EXPECTED = json.loads((OPEN / "expected.json").read_text())
FIELDS: dict[str, Any] = json.loads((HF / "config.json").read_text())
WORDS = b" .,:?QuestionAwrhatmdlygbcfkpvxzWIST0123456789\n()-!"
"""Bytes that the 60 ranks of the tiny vocabulary stand for, as far as they go."""


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of 60 ranks: with four special tokens the model's 64 ids."""
    found = list(dict.fromkeys([*WORDS, *range(33, 127)]))[:60]
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {rank}\n" for rank, byte in enumerate(found)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


def encode(file: TensorFile) -> bytes:
    """A whole file of a plan, as the driver writes it."""
    layout = file.format()
    content = b"".join(layout.begin(file.outputs))
    for output in file.outputs:
        content += b"".join(bytes(piece) for piece in layout.tensor(output, data_of(output.make()), len(content)))
        output.release()
    return content + b"".join(layout.end(len(content)))


def write(plan: TargetPlan, folder: Path) -> Path:
    """Write a plan without the driver."""
    for file in plan.files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(encode(file))
    for name, content in plan.texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def released() -> TensorMap:
    """The release's tensors."""
    return hf.read(HF)


def tensors_in_file(file: Path, tensors: dict[str, torch.Tensor]) -> TensorMap:
    """Tensors that a test made, on the disk."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return hf.read(file)


def key_map(kind: str) -> list[dict[str, Any]]:
    """MindFormers' own table at real size: rows of hf, hf_shape, ms, ms_shape."""
    with gzip.open(FIXTURE / f"mindformers_cogvlm2_{kind}_keymap.json.gz") as file:
        return json.load(file)["map"]


def of_shapes(shapes: dict[str, tuple[int, ...]], file: Path) -> TensorMap:
    """Tensors of which only the headers are there."""
    file.touch()
    return TensorMap(file, {name: TensorInfo(shape, "bfloat16", file, 0) for name, shape in shapes.items()})


def real_fields(kind: str) -> dict[str, Any]:
    """config.json of the release, as far as sizes go."""
    vision = {"image_size": 1344 if kind == "image" else 224, "patch_size": 14, "in_channels": 3, "hidden_size": 1792}
    vision |= {"intermediate_size": 15360, "num_hidden_layers": 63, "num_heads": 16}
    return {
        "architectures": ["CogVLMForCausalLM" if kind == "image" else "CogVLMVideoForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_multi_query_heads": 8,
        "max_position_embeddings": 8192 if kind == "image" else 2048,
        "vision_config": vision,
    }
