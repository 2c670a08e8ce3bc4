"""From the start of a process to the first token of a checkpoint of 2 GB, against what no program can avoid.

Writes a bfloat16 CogVLM2-shaped checkpoint in the released layout to a temporary folder and starts processes in turns,
the page cache warm: ours imports lavish, loads the folder and answers one token to a question about a picture; the
others import torch and transformers and read the weight files once, into a small buffer. `import transformers` alone
imports next to nothing (its modules are lazy), so there are two of them: that, and one which also takes the two
classes that every network with a `generate` is made of.

Goal: at most 1.5 times the time of the reading and importing process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GOAL = 1.5
TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "cogvlm2" / "open" / "checkpoint"
LAZY, NETWORK = "read + import torch, transformers", "read + import torch, PreTrainedModel, GenerationMixin"

READ = """
import pathlib, sys
buffer = bytearray(16 * 2**20)
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    with open(file, "rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass
"""
ANSWER = """
import sys, lavish
vlm = lavish.load(sys.argv[1], device="cpu")
picture = {"type": "image", "image": sys.argv[1] + "/picture.png"}
question = {"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]}
reply = vlm.chat([question], max_new_tokens=1)
assert len(reply.token_ids) == 1
"""
PROGRAMS = {
    "lavish": ANSWER,
    LAZY: "import torch, transformers" + READ,
    NETWORK: "import torch\nfrom transformers import GenerationMixin, PreTrainedModel" + READ,
    "import of the same": "import torch\nfrom transformers import GenerationMixin, PreTrainedModel",
    "read": READ,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds, which bring the files into memory")
    parser.add_argument("--folder", help="where to write the checkpoint (default: a temporary folder)")
    import _measure as measure

    measure.add_arguments(parser)
    options = parser.parse_args()
    measure.set_up(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        nbytes = write_checkpoint(Path(folder), options.gigabytes)
        clock = children_cpu if options.clock == "cpu" else time.perf_counter
        programs = {name: running(program, folder, clock) for name, program in PROGRAMS.items()}
        seconds = measure.alternate(programs, options.rounds, options.warmup)
    print(f"checkpoint of {nbytes / 1e9:.2f} GB")
    for name, spent in seconds.items():
        print(f"  {name:56} {measure.Spread.of(spent)} s")
    print(f"  bound: the reading alone, {nbytes / min(seconds['read']) / 1e9:.1f} GB/s")
    for name in (LAZY, NETWORK):
        ratio = measure.ratio(seconds, "lavish", name)
        print(f"  lavish / {name}: {ratio}")
        print("  " + measure.verdict(f"against {name}", ratio.median, GOAL, is_lower_better=True))
    return 0


def running(program: str, folder: str, clock: Callable[[], float]) -> Callable[[], float]:
    """Give something that runs a program in a process of its own and says how long it took."""

    def run() -> float:
        started = clock()
        subprocess.run([sys.executable, "-c", program, folder], check=True)
        return clock() - started

    return run


def children_cpu() -> float:
    """Processor time of the finished processes, in seconds. Not on Windows, which has no `resource`."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a folder as a release has it, with random weights; gives the bytes of the tensors."""
    import torch
    from _networks import fill
    from PIL import Image

    from lavish.checkpoints import writer
    from lavish.models.cogvlm.config import CogVLMConfig
    from lavish.models.cogvlm.model import CogVLMForCausalLM

    config = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    width = 2048 if gigabytes >= 0.5 else 64
    sizes = {"hidden_size": width, "intermediate_size": 7 * width // 2, "num_attention_heads": 16}
    layer_bytes = 2 * 2 * (width * (width + width // 2) + width * width + 3 * width * 7 * width // 2)
    config |= sizes | {
        "num_multi_query_heads": 4,
        "torch_dtype": "bfloat16",
        "num_hidden_layers": max(1, round(gigabytes * 1e9 / layer_bytes)),
    }
    network = fill(CogVLMForCausalLM, CogVLMConfig(**config), torch.bfloat16)
    state = network.state_dict()
    writer.save_sharded(state, folder, max_shard_bytes=2**30)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    Image.effect_noise((97, 61), 40).convert("RGB").save(folder / "picture.png")
    return sum(tensor.nbytes for tensor in state.values())


if __name__ == "__main__":
    sys.exit(main())
