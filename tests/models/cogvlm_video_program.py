"""A program for torchrun: load a folder of CogVLM2-Video in shares, ask it about a clip, and write down what came out.

Arguments: the model's folder, and the folder for the results. One file a process: `<rank>.safetensors`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_cogvlm_video import GREEDY, frames, messages

import lavish
from lavish.common import dist

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, results = map(Path, sys.argv[1:])
    vlm = lavish.load(folder, device="cpu", parallel="tensor")
    with torch.no_grad():
        logits = vlm.model(**vlm.processor.apply_chat_template(messages(frames(3)))).logits
    replies = vlm.batch([messages(frames(3)), messages(frames(2), "And now?")], **GREEDY)
    tokens = {f"tokens.{index}": torch.tensor(reply.token_ids) for index, reply in enumerate(replies)}
    num_bytes = {name: torch.tensor(value.nbytes) for name, value in vlm.model.named_parameters()}
    save_file({"logits": logits, **tokens, **num_bytes}, results / f"{dist.rank()}.safetensors")
    torch.distributed.destroy_process_group()
