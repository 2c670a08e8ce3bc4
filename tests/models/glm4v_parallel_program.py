"""A program for torchrun: load a folder in shares, run one batch and a chat, and write down what came out.

Arguments: the model's folder, and the folder for the results. One file a process: `<rank>.safetensors`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from glm4v_fixture import conversations, inputs

import lavish
from lavish.common import dist

if __name__ == "__main__":
    folder, results = map(Path, sys.argv[1:])
    vlm = lavish.load(folder, device="cpu", parallel="tensor")
    with torch.no_grad():
        logits = vlm.model(**inputs("multi_turn", "single_image", "text_only")).logits
    answers = vlm.batch(
        [conversations()[case] for case in ("multi_turn", "text_only")], max_new_tokens=6, do_sample=False
    )
    tokens = {f"tokens.{index}": torch.tensor(answer.token_ids) for index, answer in enumerate(answers)}
    num_bytes = torch.tensor(sum(parameter.nbytes for parameter in vlm.model.parameters()))
    save_file({"logits": logits, "num_bytes": num_bytes, **tokens}, results / f"{dist.rank()}.safetensors")
    torch.distributed.destroy_process_group()
