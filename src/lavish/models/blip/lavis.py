"""BLIP as LAVIS keeps it: a `.pth` with the weights under "model", its med_config.json and its vocabulary beside it.

Reading such a file is in `opening.py`, its names in `weights.py`. Buffers that LAVIS's transformers keeps in a state
dict are written too. Source: salesforce/LAVIS, lavis/models/base_model.py (load_checkpoint), lavis/configs/models/
med_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lavish.checkpoints.lavis import WEIGHTS
from lavish.checkpoints.output import Output, TargetOptions, TargetPlan, TensorFile
from lavish.checkpoints.released import beside, in_folder, released, renamed
from lavish.checkpoints.tensor_map import TensorMap
from lavish.checkpoints.torch_file import TorchZipFormat
from lavish.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

FILE = "checkpoint_best.pth"
"""What a run of LAVIS calls its best weights."""
TOKENIZER, TOKENIZER_FILES = "bert-base-uncased", ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
"""Second names under which a state dict holds a parameter too."""
POSITIONS = {
    "text_decoder.bert.embeddings.position_ids": "text_decoder.bert.embeddings.position_embeddings.weight",
    "text_encoder.embeddings.position_ids": "text_encoder.embeddings.position_embeddings.weight",
}
MED_FIELDS = (
    *("attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size", "initializer_range"),
    *("intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("pad_token_id", "vocab_size"),
)
"""What a med_config.json takes over from `text_config`."""


def plan_target(fields: Mapping[str, Any], tensors: TensorMap, options: TargetOptions) -> TargetPlan:
    """Say how a BLIP is written as a file of LAVIS.

    Raises:
        ConfigError: fields without their sections.
        CheckpointError: tensors of no BLIP that LAVIS has.
    """
    from lavish.models.blip.weights import architecture_of, rules_for

    where = str(tensors.path)
    found = released(tensors, rules_for(architecture_of(tensors, where), tensors), options)
    outputs = dict(found.outputs)
    made: list[tuple[str, str]] = []
    for name, first in TIED.items():
        if first in outputs and name not in outputs:
            outputs[name] = renamed(outputs[first], name)
            made.append((name, f"the same parameter as {first}"))
    for name, table in POSITIONS.items():
        if table in outputs:
            outputs[name] = _positions(name, outputs[table].shape[0])
            made.append((name, "0, 1, 2 ..., which LAVIS's BERT keeps among its weights"))
    names = {name for name, _ in made}
    return TargetPlan(
        files=(TensorFile(FILE, tuple(outputs.values()), partial(TorchZipFormat, WEIGHTS)),),
        texts=files_beside(fields, where),
        copies=in_folder(TOKENIZER, beside(tensors, TOKENIZER_FILES, (TOKENIZER, ""))),
        dropped=tuple((name, why) for name, why in found.dropped if name not in names),
        made=tuple(made),
    )


def _positions(name: str, count: int) -> Output:
    def make() -> torch.Tensor:
        import torch

        return torch.arange(count)[None]

    return Output(name, (1, count), "int64", make)


def files_beside(fields: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """Give med_config.json, which LAVIS reads, and a config.json for what no file of LAVIS says: the head counts.

    Raises:
        ConfigError: fields without their sections.
    """
    from lavish.models.blip.config import text_fields, vision_fields

    vision, text = fields.get("vision_config"), fields.get("text_config")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ConfigError(
            f"{where}: its config lacks vision_config or text_config, without which LAVIS cannot hold it."
        )
    med = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "type_vocab_size": 2,
        "add_type_embeddings": False,
        "add_cross_attention": True,
        "encoder_width": text.get("encoder_hidden_size", vision.get("hidden_size")),
        **{name: text[name] for name in MED_FIELDS if name in text},
    }
    beside_it: dict[str, Any] = {
        "vision_config": {name: vision[name] for name in vision_fields() if name in vision},
        "text_config": {name: text[name] for name in text_fields() if name in text},
    }
    if "image_text_hidden_size" in fields:
        beside_it["image_text_hidden_size"] = fields["image_text_hidden_size"]
    return {"med_config.json": _json(med), "config.json": _json(beside_it)}


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=2).encode() + b"\n"
