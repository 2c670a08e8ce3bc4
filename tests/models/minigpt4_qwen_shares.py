"""A program for torchrun: load the fixture of MiniGPT4-Qwen in shares and write down what each process computed.

Argument: the folder for the results, one `<rank>.pt` a process.
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from minigpt4_qwen_fixture import HEADS, PIECES, TRAINED, chats  # noqa: E402

import lavish  # noqa: E402
from lavish.common import dist  # noqa: E402


def main(folder: Path) -> None:
    vlm = lavish.load(TRAINED, config=HEADS, device="cpu", parallel="tensor", **PIECES)
    with torch.no_grad():
        logits = [vlm.model(**vlm.processor.apply_chat_template(spoken)).logits for spoken, _ in chats()]
    replies = [vlm.chat(spoken, max_new_tokens=14).token_ids for spoken, _ in chats()]
    sizes = {name: parameter.nbytes for name, parameter in vlm.model.named_parameters()}
    torch.save({"logits": logits, "replies": replies, "bytes": sizes}, folder / f"{dist.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
