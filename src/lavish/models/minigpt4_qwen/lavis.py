"""MiniGPT4-Qwen and MPP-LLaVA as they are released: the pieces that LAVIS loads over each other, each a file.

    eva/eva_vit_g.pth                          the tower, a flat dict
    blip2/blip2_pretrained_flant5xxl.pth       Q-Former, queries and `ln_vision`, under "model"
    bert-base-uncased/config.json              sizes of the Q-Former
    llm/                                       the decoder as a folder of Qwen's first generation, with its tokenizer
    checkpoint_9.pth                           what was trained, the projection, under "model"
    config.json                                ours: what none of them says, such as the heads of the tower

Reading is in `weights.py`. The decoder's Python files, which the release's code asks for, are not written.
Source: Coobiw/MPP-LLaVA, WEIGHT.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from lavish.checkpoints.json_file import read_optional_object
from lavish.checkpoints.lavis import WEIGHTS
from lavish.checkpoints.output import TargetOptions, TargetPlan, TensorFile, safetensors_files
from lavish.checkpoints.qwen import released_config, tokenizer_files
from lavish.checkpoints.released import Released, beside, released, renamed
from lavish.checkpoints.rules import matches
from lavish.checkpoints.tensor_map import TensorMap
from lavish.checkpoints.torch_file import TorchZipFormat
from lavish.common.errors import CheckpointError, ConfigError, MissingKeys

EVA, BLIP2, BERT, LLM, TRAINED = (
    "eva/eva_vit_g.pth",
    "blip2/blip2_pretrained_flant5xxl.pth",
    "bert-base-uncased/config.json",
    "llm",
    "checkpoint_9.pth",
)
OF_BLIP2 = ("Qformer.", "query_tokens", "ln_vision.")
QKV_BIAS = "vision_tower.encoder.layers.*.self_attn.qkv.bias"
OF_BERT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
    *("vocab_size", "max_position_embeddings", "pad_token_id"),
)
"""Fields of the Q-Former's config that BERT's config.json has too."""


def plan_target(fields: Mapping[str, Any], tensors: TensorMap, options: TargetOptions) -> TargetPlan:
    """Say how the network is written as the release's pieces.

    Raises:
        ConfigError: a section of the config is absent.
        MissingKeys: a piece has no tensors.
        CheckpointError: a bias that the tower's file has no place for.
    """
    from lavish.models.minigpt4_qwen.weights import RULES

    where = str(tensors.path)
    _check_biases(tensors)
    found = released(tensors, RULES, options)
    llm, texts = safetensors_files(_piece(found, "llm_model.", "", where), options.max_shard_bytes)
    files = (
        TensorFile(EVA, _piece(found, "visual_encoder.", "", where), TorchZipFormat),
        TensorFile(BLIP2, _of_blip2(found, where), partial(TorchZipFormat, WEIGHTS)),
        *(TensorFile(f"{LLM}/{file.name}", file.outputs, file.format) for file in llm),
        TensorFile(TRAINED, _piece(found, "llm_proj.", "llm_proj.", where), partial(TorchZipFormat, WEIGHTS)),
    )
    copies, made_files = tokenizer_files(tensors, LLM)
    return TargetPlan(
        files=files,
        texts={
            **{f"{LLM}/{name}": text for name, text in texts.items()},
            **made_files,
            f"{LLM}/config.json": _json(released_config(_section(fields, "text_config", where))),
            f"{LLM}/generation_config.json": _json(_answering(fields, tensors)),
            "config.json": _json({**fields, "model_type": "minigpt4_qwen"}),
            BERT: _json(_bert(_section(fields, "qformer_config", where))),
        },
        copies=copies,
        dropped=found.dropped,
    )


def _section(fields: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = fields.get(name)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: its config lacks {name}, without which the pieces cannot be written.")
    return section


def _piece(found: Released, prefix: str, instead: str, where: str) -> Any:
    outputs = found.named(prefix, instead)
    if not outputs:
        raise MissingKeys(f"{where}: has no tensor that a release calls {prefix}*; the pieces would not be whole.")
    return outputs


def _of_blip2(found: Released, where: str) -> Any:
    outputs = tuple(renamed(output, name) for name, output in found.outputs.items() if name.startswith(OF_BLIP2))
    if not outputs:
        raise MissingKeys(f"{where}: has no Q-Former; the pieces would not be whole.")
    return outputs


def _answering(fields: Mapping[str, Any], tensors: TensorMap) -> dict[str, Any]:
    """Give the decoder's generation_config.json: the source's, with the window that the config says."""
    name = "generation_config.json"
    known = {key: read_optional_object(path) for key, path in beside(tensors, (name,), ("", LLM)).items()}
    window = {"max_window_size": fields["max_window_size"]} if "max_window_size" in fields else {}
    return {"chat_format": "chatml", **known.get(name, {}), **window}


def _check_biases(tensors: TensorMap) -> None:
    """The tower's file has biases of queries and values only: the keys' must be zeros."""
    for name in tensors:
        if matches((QKV_BIAS,), name):
            bias = tensors[name]
            if bool(bias.chunk(3)[1].count_nonzero()):
                raise CheckpointError(
                    f"{tensors.path}: {name!r} has a bias of the keys that is not zero, and eva_vit_g.pth has no place "
                    "for it: the tower was trained elsewhere. Convert to hf or mindspore."
                )


def _bert(qformer: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: qformer[name] for name in OF_BERT if name in qformer}
    return {"architectures": ["BertForMaskedLM"], "model_type": "bert", "type_vocab_size": 2, **found}


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
