"""From the released pieces of MiniGPT4-Qwen and MPP-LLaVA to our modules.

The release loads, one over the other: `eva_vit_g.pth`, the LLM's folder, BLIP-2's `.pth`, and what was trained. Here
each piece gets the names that it has in the whole model of the release (`visual_encoder.`, `ln_vision.`, `Qformer.`,
`query_tokens`, `llm_proj.`, `llm_model.`), the maps are laid over each other in that order, and RULES lead to our
modules. A whole model under those names needs no other rules.
Source: Coobiw/MPP-LLaVA, WEIGHT.md, pipemodel2pth.py, lavis/models/minigpt4qwen_models/minigpt4qwen_pipe.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lavish.checkpoints import deepspeed, hf, lavis
from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.checkpoints.layouts import read_weights
from lavish.checkpoints.pickles import read_table
from lavish.checkpoints.qwen import native_lora, qwen_rules
from lavish.checkpoints.release import Release, find_piece, merged, with_config
from lavish.checkpoints.rules import Drop, Merge, Optional, Rename, Rule, Surplus
from lavish.checkpoints.tensor_map import TensorInfo, TensorMap
from lavish.common.errors import CheckpointError, ConfigError, UnknownLayout
from lavish.nn.qwen import read_qwen_config
from lavish.processors.qwen_tokenizer import RANK_FILE, load_qwen_tokenizer

PIECES = ("eva", "blip2", "qformer", "llm")
"""Keywords of lavish.load: the vision file, BLIP-2's file, BERT's folder, the LLM's folder."""

EVA_VIT_G = {"hidden_size": 1408, "num_attention_heads": 16, "num_hidden_layers": 39}
"""What the files do not say of the one tower that was released. Its file may hold a 40th block, which is not run."""
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
"""config.json of bert-base-uncased, as far as the Q-Former takes it."""

_VISION, _BLOCK, _LAYER = "vision_tower.", "visual_encoder.blocks.*", "vision_tower.encoder.layers.*"
_BERT, _BERT_LAYER, _QFORMER_LAYER = (
    "Qformer.bert.embeddings",
    "Qformer.bert.encoder.layer.*",
    "qformer.encoder.layer.*",
)
_TEXT_BRANCH = "the Q-Former's text branch, which no image passes"
_HEAD = "a head of the tower's pre-training"

RULES: tuple[Rule, ...] = (
    # tower
    Rename("visual_encoder.cls_token", f"{_VISION}embeddings.class_embedding"),
    Rename("visual_encoder.pos_embed", f"{_VISION}embeddings.position_embedding"),
    Rename("visual_encoder.patch_embed.proj.*", f"{_VISION}embeddings.patch_embedding.*"),
    Rename(f"{_BLOCK}.norm1.*", f"{_LAYER}.layer_norm1.*"),
    Rename(f"{_BLOCK}.norm2.*", f"{_LAYER}.layer_norm2.*"),
    Rename(f"{_BLOCK}.attn.qkv.weight", f"{_LAYER}.self_attn.qkv.weight"),
    # Trap: the keys have no bias of their own; it is zeros between the two that are stored.
    Merge((f"{_BLOCK}.attn.q_bias", None, f"{_BLOCK}.attn.v_bias"), f"{_LAYER}.self_attn.qkv.bias"),
    Rename(f"{_BLOCK}.attn.proj.*", f"{_LAYER}.self_attn.projection.*"),
    Rename(f"{_BLOCK}.mlp.*.*", f"{_LAYER}.mlp.*.*"),
    Rename("ln_vision.*", f"{_VISION}post_layernorm.*"),
    Drop("visual_encoder.norm.*", why="the release takes the blocks' output as it is"),
    Drop("visual_encoder.fc_norm.*", why=_HEAD),
    Drop("visual_encoder.head.*", why=_HEAD),
    Surplus(f"{_LAYER}.*.*", why="blocks beyond the config's depth: LAVIS runs 39 of the file's"),
    Surplus(f"{_LAYER}.*.*.*", why="as above"),
    # Q-Former
    Rename(f"{_BERT}.LayerNorm.*", "qformer.layernorm.*"),
    Rename(f"{_BERT_LAYER}.attention.self.*.*", f"{_QFORMER_LAYER}.attention.attention.*.*"),
    Rename(f"{_BERT_LAYER}.crossattention.self.*.*", f"{_QFORMER_LAYER}.crossattention.attention.*.*"),
    Rename(f"{_BERT_LAYER}.attention.output.*.*", f"{_QFORMER_LAYER}.attention.output.*.*"),
    Rename(f"{_BERT_LAYER}.crossattention.output.*.*", f"{_QFORMER_LAYER}.crossattention.output.*.*"),
    Rename(f"{_BERT_LAYER}.intermediate_query.*.*", f"{_QFORMER_LAYER}.intermediate_query.*.*"),
    Rename(f"{_BERT_LAYER}.output_query.*.*", f"{_QFORMER_LAYER}.output_query.*.*"),
    Drop(f"{_BERT}.position_ids", why="a constant; a trained file of v1 holds one by mistake"),
    Drop(f"{_BERT}.word_embeddings.weight", why=_TEXT_BRANCH),
    Drop(f"{_BERT}.position_embeddings.weight", why=_TEXT_BRANCH),
    Drop(f"{_BERT_LAYER}.intermediate.*.*", why=_TEXT_BRANCH),
    Drop(f"{_BERT_LAYER}.output.*.*", why=_TEXT_BRANCH),
    *(Drop(f"Qformer.cls{depth * '.*'}", why=_TEXT_BRANCH) for depth in range(1, 6)),
    Drop("t5_proj.*", why="the projection to the decoder that BLIP-2's file was trained with"),
    Drop("opt_proj.*", why="as t5_proj"),
    # projection and decoder
    Rename("llm_proj.*", "projector.*"),
    *qwen_rules(source="llm_model."),
)

UNTRAINED: tuple[Rule, ...] = (Optional("projector.*", why="it starts random"),)
"""In place of a projector's weights."""

TENSOR_PARALLEL_PLAN = MappingProxyType(
    {
        "language_model.layers.*.self_attn.q_proj": "colwise",
        "language_model.layers.*.self_attn.k_proj": "colwise",
        "language_model.layers.*.self_attn.v_proj": "colwise",
        "language_model.layers.*.self_attn.o_proj": "rowwise",
        "language_model.layers.*.mlp.gate_proj": "colwise",
        "language_model.layers.*.mlp.up_proj": "colwise",
        "language_model.layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }
)
"""What several processes share. Whole in each of them: embedding table, norms, tower, Q-Former and projector, 20 % of
the 7B. The tower's attention reads its width off its input, so a share of it would be taken for a smaller one."""


def complete(network: Any, absent: Iterable[str] = ()) -> None:
    """Check that loading left nothing: every tensor of this family is in a file.

    Raises:
        CheckpointError: a name that cannot be computed.
    """
    for name in absent:
        raise CheckpointError(f"{name!r} is in no file and cannot be computed. Fetch the checkpoint again.")


def native_adapter(fields: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a LoRA on the released decoder (`c_attn` ...) as one for our modules; one for ours as it is."""
    return native_lora(fields, tensors, "language_model.")


# -- the pieces --------------------------------------------------------------------------------------------------------


def open_release(path: Path, pieces: Mapping[str, Path]) -> Release:
    """Open the pieces of a release as one.

    `path` is a folder that holds them side by side (as they come, or each in a folder of its own), or the piece that
    was trained: a `.pth`, a pipeline run's folder (`layer_XX-model_states.pt`) or a DeepSpeed run's
    `mp_rank_00_model_states.pt`.

    Raises:
        ConfigError: a piece is absent or there twice, or a size is unknown.
        CheckpointError: a piece is damaged or of another kind.
    """
    folder = path if path.is_dir() and not _is_run(path) else None
    found = _find_pieces(path, folder, pieces)
    trained_path = path if folder is None else _find_trained(folder, {found["eva"], found["blip2"]})
    return _opened(path, folder, pieces, found, read_trained(trained_path))


def open_untrained(folder: Path | None, pieces: Mapping[str, Path]) -> Release:
    """Open the pieces that a training of the projector starts from: all but the one that was trained, which is not
    read where the folder has it.

    Raises: as `open_release`.
    """
    if folder is not None and (not folder.is_dir() or _is_run(folder)):
        raise ConfigError(
            f"{folder} is a piece that was trained, and its projector was to start random. Give the folder that holds "
            f"the other pieces, or name them: {', '.join(f'{name}=...' for name in PIECES)}."
        )
    path = folder or next(iter(pieces.values()), Path())
    return replace(_opened(path, folder, pieces, _find_pieces(path, folder, pieces), None), is_untrained=True)


def start_projector(network: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Fill the projector, which is on the meta device, with random weights: torch's own, as in the release."""
    network.projector.to_empty(device=device).to(dtype).reset_parameters()


def _find_pieces(path: Path, folder: Path | None, pieces: Mapping[str, Path]) -> dict[str, Path]:
    here = pieces_in(folder)
    return {name: find_piece(name, path, pieces, here[name]) for name in ("eva", "blip2", "llm")}


def _opened(
    path: Path, folder: Path | None, pieces: Mapping[str, Path], found: Mapping[str, Path], trained: TensorMap | None
) -> Release:
    """Lay the pieces over each other, and read what they say of their sizes."""
    trained = TensorMap(path, {}) if trained is None else trained
    llm = found["llm"]
    eva, blip2 = _eva(found["eva"]), lavis.read(found["blip2"])
    tensors = merged(path, [("", eva), ("", _llm_weights(llm, trained)), ("", blip2), ("", trained)])
    vision = _vision_fields(tensors)
    bert = _bert_config(path, pieces, pieces_in(folder)["qformer"], tensors)
    text = read_qwen_config(read_object(llm / "config.json"), str(llm / "config.json")).to_dict()
    fields: dict[str, Any] = {
        "architectures": ["MiniGPT4QwenForConditionalGeneration"],
        "vision_config": vision,
        "qformer_config": _qformer_fields(bert, tensors, vision["hidden_size"]),
        "text_config": text,
        "num_query_tokens": _shape(tensors, "query_tokens")[1],
        **_token_ids(llm),
    }
    answering = read_optional_object(llm / "generation_config.json")
    if isinstance(answering.get("max_window_size"), int):
        fields["max_window_size"] = answering["max_window_size"]
    # Its eos is <|endoftext|>; the release stops at <|im_end|> and <|im_start|> whatever the file says.
    sampling = {name: value for name, value in answering.items() if name in ("temperature", "top_p", "top_k")}
    return Release(with_config(folder, "minigpt4_qwen", fields), tensors, llm, load_qwen_tokenizer, sampling)


def pieces_in(folder: Path | None) -> dict[str, list[Path]]:
    """Give where a folder may hold each piece: itself, or in a folder of the piece's own."""
    return {
        "eva": _glob(folder, "eva*.pth"),
        "blip2": _glob(folder, "blip2*.pth"),
        "qformer": _configs(folder, "bert"),
        "llm": _configs(folder, "qwen"),
    }


def read_trained(path: Path) -> TensorMap:
    """Read what was trained, under the names of the release's whole model.

    A `.pth` (flat, or under "model"), a DeepSpeed run of ZeRO 0 to 3 (a step's folder, or the one above it), or a
    folder of a pipeline run.

    Raises:
        UnknownLayout: nothing of the kind is there.
        CheckpointError: damaged, or shards are absent.
    """
    if path.is_dir() and (layers := sorted(path.glob("layer_*-model_states.pt"))):
        return _pipeline(path, layers)
    if path.name.startswith("layer_"):
        raise UnknownLayout(f"{path}: one layer of a pipeline run; give its folder, {path.parent}.")
    if deepspeed.is_run(path):
        return read_weights(path)
    if path.is_dir():
        raise UnknownLayout(
            f"{path}: no trained weights; looked for layer_XX-model_states.pt and mp_rank_00_model_states.pt."
        )
    return lavis.read(path)


def _pipeline(folder: Path, layers: Iterable[Path]) -> TensorMap:
    """Lay the files of a pipeline run together. The blocks are counted in the order of their files: how many files
    without weights come before them is a matter of the run.
    """
    infos: dict[str, TensorInfo] = {}
    num_blocks = 0
    for file in layers:
        table = read_table(file)
        is_block = any(name.startswith("layer.") for name in table)
        for name, info in table.items():
            infos[_whole_name(file, name, num_blocks)] = info
        num_blocks += is_block
    infos.pop("", None)
    return TensorMap(folder, infos)


def _whole_name(file: Path, name: str, block: int) -> str:
    """Give the name that a tensor of a pipeline layer has in the whole model; "" for one to leave out."""
    named = {
        "wtepipe.word_embeddings.weight": "llm_model.transformer.wte.weight",
        "final_layernorm.weight": "llm_model.transformer.ln_f.weight",
        "lm_head.weight": "llm_model.lm_head.weight",
        "occupy.weight": "",  # zeros that keep the last process busy
        "rotary_emb.inv_freq": "",  # computed
    }
    if name in named:
        return named[name]
    for prefix, whole in (("visionpipe.", ""), ("layer.", f"llm_model.transformer.h.{block}.")):
        if name.startswith(prefix):
            return whole + name.removeprefix(prefix)
    raise CheckpointError(
        f"{file}: holds {name!r}, which no pipeline layer of MPP-LLaVA has (visionpipe., wtepipe., layer., "
        "final_layernorm, lm_head)."
    )


def _is_run(folder: Path) -> bool:
    return any(folder.glob("*model_states.pt")) or (folder / deepspeed.LATEST).is_file()


def _find_trained(folder: Path, others: set[Path]) -> Path:
    """Find the trained piece in a folder of pieces: any `.pth` that is no other piece, or the folder of a run."""
    files = [file for file in _glob(folder, "*.pth") if file not in others]
    runs = sorted({file.parent for file in _glob(folder, "*model_states.pt")})
    found = files + [run for run in runs if not any(file.parent == run for file in files)]
    if not found:
        raise ConfigError(
            f"{folder}: the piece that was trained is absent (checkpoint_9.pth, model.pth, unfreeze_llm_model.pth, "
            "layer_XX-model_states.pt ...). Put it there, or give it as the path and the others by name: "
            f"{', '.join(f'{name}=...' for name in PIECES)}."
        )
    if len(found) > 1:
        raise ConfigError(
            f"{folder}: holds {len(found)} trained pieces, {found[0]} and {found[1]}. Give the one to load as the "
            f"path, and the others by name: {', '.join(f'{name}=...' for name in PIECES)}."
        )
    return found[0]


def _glob(folder: Path | None, pattern: str) -> list[Path]:
    """Look in a folder and one below it, as the release lays its files."""
    return [] if folder is None else sorted([*folder.glob(pattern), *folder.glob(f"*/{pattern}")])


def _configs(folder: Path | None, model_type: str) -> list[Path]:
    """Give the folders whose config.json is of a type."""
    return [file.parent for file in _glob(folder, "config.json") if read_object(file).get("model_type") == model_type]


def _eva(file: Path) -> TensorMap:
    """Read the tower's file, whose names have no prefix; those of a whole model are taken too."""
    tensors = lavis.read(file)
    if "cls_token" not in tensors:
        raise CheckpointError(
            f"{file}: no EVA-ViT (it holds no 'cls_token'; its first name is {next(iter(tensors))!r}). Give "
            "eva_vit_g.pth of LAVIS."
        )
    return TensorMap(file, {f"visual_encoder.{name}": info for name, info in tensors.infos.items()})


def _llm_weights(llm: Path, trained: TensorMap) -> TensorMap:
    """Read the LLM's weights; they may be absent where the trained file brings all of them."""
    has_all = {"llm_model.lm_head.weight", "llm_model.transformer.wte.weight"} <= set(trained)
    if has_all and not any((llm / name).is_file() for name in hf.WEIGHT_FILES):
        return TensorMap(llm, {})
    tensors = hf.read(llm)
    return TensorMap(llm, {f"llm_model.{name}": info for name, info in tensors.infos.items()})


# -- what the files say of their sizes ---------------------------------------------------------------------------------


def _shape(tensors: TensorMap, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{tensors.path}: {name!r} is in none of the pieces; are they of one release?")
    return tensors.info(name).shape


def _vision_fields(tensors: TensorMap) -> dict[str, Any]:
    """Give the tower's sizes; the number of its heads is known of the released one only."""
    prefix = "visual_encoder."
    blocks = {name.split(".")[2] for name in tensors if name.startswith(f"{prefix}blocks.")}
    positions, hidden_size = _shape(tensors, f"{prefix}pos_embed")[1:]
    patch_size = _shape(tensors, f"{prefix}patch_embed.proj.weight")[-1]
    fields = {
        "hidden_size": hidden_size,
        "intermediate_size": _shape(tensors, f"{prefix}blocks.0.mlp.fc1.weight")[0],
        "num_hidden_layers": len(blocks),
        "patch_size": patch_size,
        "image_size": math.isqrt(positions - 1) * patch_size,
    }
    if hidden_size == EVA_VIT_G["hidden_size"]:
        layers = min(len(blocks), EVA_VIT_G["num_hidden_layers"])
        fields |= {"num_attention_heads": EVA_VIT_G["num_attention_heads"], "num_hidden_layers": layers}
    return fields


def _bert_config(path: Path, pieces: Mapping[str, Path], places: list[Path], tensors: TensorMap) -> dict[str, Any]:
    """Read BERT's config.json; without one, that of bert-base-uncased where the width is its own."""
    is_base = _shape(tensors, "query_tokens")[-1] == BERT_BASE["hidden_size"]
    if is_base and not places and "qformer" not in pieces:
        return BERT_BASE
    place = find_piece("qformer", path, pieces, places)
    return read_object(place if place.is_file() else place / "config.json")


def _qformer_fields(bert: Mapping[str, Any], tensors: TensorMap, encoder_width: int) -> dict[str, Any]:
    taken = (*BERT_BASE, "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
    fields = {name: bert[name] for name in taken if name in bert}
    prefix = "Qformer.bert.encoder.layer."
    crossing = {int(name.split(".")[4]) for name in tensors if name.startswith(prefix) and ".crossattention." in name}
    step = sorted(crossing)[1] if len(crossing) > 1 else max(len(_qformer_layers(tensors)), 1)
    return {**fields, "encoder_hidden_size": encoder_width, "cross_attention_frequency": step}


def _qformer_layers(tensors: TensorMap) -> set[str]:
    return {name.split(".")[4] for name in tensors if name.startswith("Qformer.bert.encoder.layer.")}


def _token_ids(llm: Path) -> dict[str, Any]:
    """Give the ids of the special tokens, which follow the ranks; the tokenizer has them in this order."""
    file = llm / RANK_FILE
    if not file.is_file():
        raise CheckpointError(f"{llm}: no {RANK_FILE}, the tokenizer of Qwen's first generation. Fetch it.")
    lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
    if any(len(line) != 2 or not line[1].isdigit() for line in lines):
        raise CheckpointError(
            f"{file} is no rank file: expected 'base64 rank' in each of its lines. It is another model's tokenizer, or "
            "damaged; fetch the file again."
        )
    end_of_text = len(lines)
    return {
        "pad_token_id": end_of_text,
        "eos_token_id": [end_of_text + 2, end_of_text + 1],  # <|im_end|>, <|im_start|>
        "image_token_id": end_of_text + 3,
    }
