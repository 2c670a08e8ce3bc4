"""GPTDialogue as a run of LAVIS leaves it: `checkpoint_best.pth` with the weights under "model".

The masks that old transformers kept beside the weights are not written: they are made with the network.
Source: salesforce/LAVIS, lavis/runners/runner_base.py (_save_checkpoint), lavis/models/gpt_models/gpt_dialogue.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from lavish.checkpoints.lavis import WEIGHTS
from lavish.checkpoints.output import TargetOptions, TargetPlan, TensorFile
from lavish.checkpoints.released import beside, in_folder, released, renamed
from lavish.checkpoints.tensor_map import TensorMap
from lavish.checkpoints.torch_file import TorchZipFormat

FILE, TOKENIZER = "checkpoint_best.pth", "gpt2"
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


def plan_target(fields: Mapping[str, Any], tensors: TensorMap, options: TargetOptions) -> TargetPlan:
    """Say how a GPTDialogue is written as a file of LAVIS."""
    from lavish.models.gpt_dialogue.weights import RULES

    found = released(tensors, RULES, options)
    outputs, made = dict(found.outputs), ()
    if HEAD not in outputs and TABLE in outputs:
        outputs[HEAD] = renamed(outputs[TABLE], HEAD)
        made = ((HEAD, f"the same parameter as {TABLE}"),)
    return TargetPlan(
        files=(TensorFile(FILE, tuple(outputs.values()), partial(TorchZipFormat, WEIGHTS)),),
        texts={"config.json": json.dumps(dict(fields), indent=2, default=str).encode() + b"\n"},
        copies=in_folder(TOKENIZER, beside(tensors, TOKENIZER_FILES, ("", TOKENIZER))),
        dropped=found.dropped,
        made=made,
    )
