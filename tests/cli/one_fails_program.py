"""A program for torchrun: the command `lavish` of the arguments, whose second process fails in its third pass."""

import os
import signal
import sys

import torch

from lavish.cli import main
from lavish.inference.steps import CogVLMSteps

decode = CogVLMSteps.decode
calls: list[int] = []


def fail_later(self, *args, **kwargs):
    calls.append(0)
    if len(calls) == 3:
        if os.environ["HOW"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("no memory left on this one")
    return decode(self, *args, **kwargs)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        CogVLMSteps.decode = fail_later
    sys.exit(main())
