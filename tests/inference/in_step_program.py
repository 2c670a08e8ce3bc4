"""A program for torchrun: the first process asks and is interrupted, the others compute along.

Arguments: folder of a checkpoint, a picture, and the file for what came out.
"""

import json
import sys
from pathlib import Path

import lavish
from lavish.common import dist
from lavish.inference.in_step import Channel, follow, lead

GENERATION = {"max_new_tokens": 12, "do_sample": False}


def conversations(picture: str) -> list[list[dict]]:
    image = {"type": "image", "image": picture}
    seen = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    return [
        seen,
        [*seen, {"role": "assistant", "content": "A thing"}, {"role": "user", "content": "Which?"}],
        [{"role": "user", "content": "Hello"}],
    ]


def answers(vlm: "lavish.VLM", picture: str) -> list[list[int]]:
    """More conversations than caches are kept, one of them twice, and a batch whose rows end one after the other."""
    many = conversations(picture)
    found = [vlm.chat(messages, **GENERATION).token_ids for messages in [*many, many[0], *many]]
    ended = found[0][5]
    vlm._eos_token_ids = frozenset([ended])
    found += [reply.token_ids for reply in vlm.batch(many, **GENERATION)]
    vlm._eos_token_ids = frozenset()
    return found


def interrupted(vlm: "lavish.VLM", picture: str, presses: list[bool]) -> str:
    stream = vlm.stream(conversations(picture)[1], **GENERATION)
    try:
        for _ in stream:
            presses.append(True)
    except KeyboardInterrupt:
        return stream.reply.finish_reason
    return "not interrupted"


if __name__ == "__main__":
    vlm = lavish.load(sys.argv[1], device="cpu", parallel="tensor")
    channel, presses = Channel("cpu"), []
    if dist.is_main():
        lead(vlm, channel, lambda: bool(presses) and presses.pop())
        told = {"first": interrupted(vlm, sys.argv[2], presses), "answers": answers(vlm, sys.argv[2])}
        told |= {"again": interrupted(vlm, sys.argv[2], presses), "after": answers(vlm, sys.argv[2])}
        told["length"] = len(vlm._steps._numbers)
        channel.dismiss()
        Path(sys.argv[3]).write_text(json.dumps(told))
    else:
        follow(vlm, channel)
