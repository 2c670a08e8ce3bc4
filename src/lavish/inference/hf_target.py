"""A Hugging Face folder as the target of a conversion: what `lavish.load`, and transformers after `lavish.register()`,
read.

From another such folder the names and all small files go over as they are; from any other layout it is what
`save_pretrained` of network and processor would write.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavish.checkpoints import hf, hub
from lavish.checkpoints.output import FLOATS, Output, TargetOptions, TargetPlan, safetensors_files
from lavish.checkpoints.rules import Optional, matches
from lavish.common.errors import CheckpointError, ConfigError
from lavish.inference.lora import deltas
from lavish.inference.source import Source, network_outputs

CONFIG, GENERATION = "config.json", "generation_config.json"
SMALL_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".md")
SMALL_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
NOT_COPIED = (CONFIG, "trainer_state.json", "zero_to_fp32.py", "adapter_config.json")
"""Written anew, or of a training run."""
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.txt", "qwen.tiktoken")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_SMALL_BYTES = 100_000_000


def plan_hf(source: Source, options: TargetOptions, tokenizer: str | Path | None) -> tuple[TargetPlan, list[str]]:
    """Say what is written, and what the reader of the report should know.

    Raises:
        ConfigError: a LoRA belongs to the source and nobody said what becomes of it.
        CheckpointError: tokenizer or adapter are damaged.
    """
    added = {}
    if source.adapter is not None:
        if not options.merge_lora:
            raise ConfigError(
                f"{source.adapter} is a LoRA that belongs to the model. Add it to the weights (--merge-lora), or write "
                "it alone (--to peft)."
            )
        native = source.family.native_adapter if source.opened is not None else None
        added = deltas(source.adapter, native, source.places.sources)
    outputs = network_outputs(source, options, added)
    computed, made = _computed(source, outputs)
    outputs += computed
    files, texts = safetensors_files(outputs, options.max_shard_bytes)
    notes: list[str] = []
    texts |= {CONFIG: _config_text(source, options, outputs), **_generation(source)}
    copies = _small_files(source.folder, [*texts]) if source.is_folder_of_release else {}
    if tokenizer is not None or not source.is_folder_of_release:
        beside = _processor_files(source, tokenizer, notes)
        copies = {name: path for name, path in copies.items() if name not in beside}
        texts |= {name: content for name, content in beside.items() if name not in (CONFIG, GENERATION)}
    return TargetPlan(files, texts, copies, tuple(source.dropped), tuple(made)), notes


def _computed(source: Source, outputs: list[Output]) -> tuple[list[Output], list[tuple[str, str]]]:
    """Give what the release's own files hold and this layout does not: other programs read it from there."""
    if source.is_folder_of_release or source.opened is None:
        return [], []
    optional = [rule for rule in source.rules if isinstance(rule, Optional)]
    dtype = _usual_dtype(outputs)
    found: list[Output] = []
    made: list[tuple[str, str]] = []
    for name, value in source.network.state_dict().items():
        why = next((rule.why for rule in optional if matches((rule.target,), name)), None)
        if why is not None and name not in source.places.sources:
            make = partial(source.family.computed, source.config, name, getattr(torch, dtype))
            found.append(Output(name, tuple(value.shape), dtype, make))
            made.append((name, why))
    return found, made


def _config_text(source: Source, options: TargetOptions, outputs: list[Output]) -> bytes:
    if source.is_folder_of_release:
        file = source.folder / CONFIG
        content = file.read_bytes() if file.is_file() else _json(source.fields)  # DeepSpeed's shards: it was given
        fields = json.loads(content.decode("utf-8-sig"))
        changed = {**fields, **source.overrides}
        if options.dtype is not None:
            changed["torch_dtype" if "torch_dtype" in fields else "dtype"] = options.dtype
        return content if changed == fields else _json(changed)
    fields = json.loads(source.config.to_json_string())
    fields["architectures"] = [type(source.network).__name__]
    fields["model_type"] = source.config.model_type
    fields.pop("torch_dtype", None)
    fields["dtype"] = options.dtype or _usual_dtype(outputs)
    return _json(fields)


def _usual_dtype(outputs: list[Output]) -> str:
    """Give the float dtype that holds the most elements."""
    held: Counter[str] = Counter()
    for output in outputs:
        if output.dtype in FLOATS:
            held[output.dtype] += output.nbytes
    return held.most_common(1)[0][0] if held else "float32"


def _generation(source: Source) -> dict[str, bytes]:
    release = source.opened.release if source.opened is not None else None
    return {GENERATION: _json(release.generation_config)} if release is not None and release.generation_config else {}


def _small_files(folder: Path, others: list[str]) -> dict[str, Path]:
    """Find what stands beside the weights: tokenizer, generation config, licence, the release's own code."""
    found: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        name = entry.name
        is_small = entry.suffix in SMALL_SUFFIXES or name.startswith(SMALL_NAMES)
        is_other = name in (*NOT_COPIED, *others) or name.endswith(hf.INDEX_SUFFIX) or name.startswith(".")
        if is_small and not is_other and entry.is_file():
            file = hf.inside(folder, name)
            if file.stat().st_size <= MAX_SMALL_BYTES:
                found[name] = file
    return found


def _processor_files(source: Source, tokenizer: str | Path | None, notes: list[str]) -> dict[str, bytes]:
    """Give the files that `save_pretrained` of the processor writes; without a tokenizer there is none, and a note
    says so."""
    release = source.opened.release if source.opened is not None else None
    if source.opened is None:
        processor = source.family.processor_of(source.path, source.config, tokenizer)
    elif tokenizer is None and release is not None and not _has_tokenizer(release.tokenizer):
        processor = None
    else:
        processor = source.opened.processor(tokenizer, is_overridden=bool(source.overrides))
    if processor is None:
        notes.append(
            f"{source.path} has no tokenizer, so the folder has none either: give it to lavish.load(tokenizer=...), or "
            "convert with --tokenizer FOLDER."
        )
        return {}
    with tempfile.TemporaryDirectory(prefix="lavish-") as folder:
        processor.save_pretrained(folder)
        made = {
            str(file.relative_to(folder)).replace("\\", "/"): file.read_bytes()
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
    if not made:
        raise CheckpointError(f"{source.path}: its processor wrote no files.")
    return made


def tokenizer_files(tokenizer: str | Path) -> dict[str, Path]:
    """Give the files of a tokenizer, a folder or hub id.

    Raises:
        ConfigError: it has none.
    """
    folder = hub.resolve(tokenizer)
    found = {
        name: hf.inside(folder, name) for name in (*TOKENIZER_FILES, *TOKENIZER_CONFIGS) if (folder / name).is_file()
    }
    if not any(name in found for name in TOKENIZER_FILES):
        raise ConfigError(f"{folder}: no tokenizer; looked for {', '.join(TOKENIZER_FILES)}.")
    return found


def _has_tokenizer(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in (*TOKENIZER_FILES, "tokenizer_config.json"))


def _json(fields: Any) -> bytes:
    return json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
