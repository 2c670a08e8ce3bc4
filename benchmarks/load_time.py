"""From the start of a process to the first token of a 2 GB checkpoint, against reading its file once after the imports.

Writes a CogVLM2-shaped bfloat16 checkpoint of `--gigabytes` with random weights, then starts processes in turns:
`lavish.load` and one streamed token, against `import torch`, the classes of transformers that any network needs, and
every weight file read once (the bound: no loader can do less). Goal: at most 1.5 times. Files are in the page cache.
Prints wall and CPU time; on a machine that others keep busy only the second one says something.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _measure import Spread, ratio, verdict

GOAL = 1.5
TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "cogvlm2" / "open" / "checkpoint"
FIRST_TOKEN = """
import sys, lavish
vlm = lavish.load(sys.argv[1], device="cpu")
for piece in vlm.stream([{"role": "user", "content": "What is this?"}], max_new_tokens=1, do_sample=False):
    break
"""
READ_ONCE = """
import sys, torch
from pathlib import Path
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
buffer = bytearray(1 << 23)
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with file.open("rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass
"""


def main() -> int:
    """Write the checkpoint, start the processes in turns, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, after one untimed of each")
    parser.add_argument("--folder", help="where to write it (default: a temporary folder, removed afterwards)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(f"checkpoint: {write_checkpoint(Path(folder), options.gigabytes) / 1e9:.3f} GB bfloat16")
        wall: dict[str, list[float]] = {"first token": [], "read once": []}
        cpu: dict[str, list[float]] = {"first token": [], "read once": []}
        for index in range(1 + options.rounds):
            for name, script in (("first token", FIRST_TOKEN), ("read once", READ_ONCE)):
                spent_wall, spent_cpu = timed(script, folder)
                if index:
                    wall[name].append(spent_wall)
                    cpu[name].append(spent_cpu)
    for clock, seconds in (("wall", wall), ("CPU", cpu)):
        print(f"{clock} seconds: " + ", ".join(f"{name} {Spread.of(values)}" for name, values in seconds.items()))
        compared = ratio(seconds, "first token", "read once")
        print(verdict(f"{clock} time to the first token", compared.median, GOAL, is_lower_better=True))
    return 0


def timed(script: str, folder: str) -> tuple[float, float]:
    """Run a process of its own; gives its wall and its CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", script, folder], check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a folder in the released layout with the tokenizer of the fixture; gives the bytes of its tensors."""
    import torch

    from lavish.checkpoints import writer
    from lavish.models.cogvlm.config import CogVLMConfig
    from lavish.models.cogvlm.model import CogVLMForCausalLM

    fields = json.loads((TOKENIZER / "config.json").read_text())
    fields |= {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_multi_query_heads": 4}

    def on_meta(num_layers: int) -> CogVLMForCausalLM:
        fields["num_hidden_layers"] = num_layers
        with torch.device("meta"):
            return CogVLMForCausalLM(CogVLMConfig(**fields))

    def nbytes(network: CogVLMForCausalLM) -> int:
        return sum(2 * value.numel() for value in network.state_dict().values())

    one = nbytes(on_meta(2)) - nbytes(on_meta(1))
    fixed = nbytes(on_meta(1)) - one
    network = on_meta(max(1, round((gigabytes * 1e9 - fixed) / one)))
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("inv_freq"):  # no random numbers; the network computes it where the files lack it
            continue
        drawn = torch.randn(min(value.numel(), 1 << 20), generator=generator).mul_(0.02).bfloat16()
        state[name] = drawn.repeat(-(-value.numel() // drawn.numel()))[: value.numel()].reshape(value.shape)
    for file in TOKENIZER.iterdir():
        if file.suffix in (".json", ".model") and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(fields | {"torch_dtype": "bfloat16"}))
    writer.save_sharded(state, folder)
    return nbytes(network)


if __name__ == "__main__":
    sys.exit(main())
