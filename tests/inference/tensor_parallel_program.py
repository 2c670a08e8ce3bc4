"""A program for torchrun: load a fixture's checkpoint in shares, run its prompts, and write down what came out.

Arguments: family, folder for the results, and options as JSON. One file a process: `<rank>.safetensors`, `<rank>.json`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "models")]

from cogvlm_fixture import golden  # noqa: E402
from conftest import to_messages  # noqa: E402

import lavish  # noqa: E402
from lavish.common import dist  # noqa: E402
from lavish.common.errors import ConfigError  # noqa: E402
from lavish.inference import parallel  # noqa: E402
from lavish.inference.static_step import StaticStep  # noqa: E402

GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


def equal_blocks(num_heads, num_key_value_heads, num_rows, rank, size):
    """The trap: equal row blocks of a fused query_key_value."""
    return ((rank * num_rows // size, (rank + 1) * num_rows // size),)


def bytes_of(network) -> dict[str, int]:
    return {name: parameter.nbytes for name, parameter in network.named_parameters()}


@torch.no_grad()
def gathered(weight: torch.Tensor) -> torch.Tensor:
    """Multiply 2 by the rows of a matrix, of which the last process has fewer than the others."""
    part = weight.split(-(-len(weight) // dist.world_size()))[dist.rank()]
    layer = parallel.GatheredLinear(1, len(part), bias=False)
    layer.weight.copy_(part)
    layer.num_features = len(weight)
    return layer(torch.full((1, 1), 2.0))


def run(family: str, folder: Path) -> tuple[dict, dict]:
    """Every prompt of the fixture alone, the left-padded batch, and conversations through the VLM."""
    data = golden(family)
    checkpoint = data.folder / "checkpoint"
    vlm = lavish.load(checkpoint, device="cpu", parallel="tensor")
    network = vlm.model
    tensors, told = {}, {"bytes": bytes_of(network), "ids": {}}
    with torch.no_grad():
        for name in data.ids():
            inputs = data.inputs(name)
            tensors[f"{name}.logits"] = network(**inputs).logits[0]
            if inputs.get("pixel_values") is not None:
                tensors[f"{name}.vision.features"] = network.get_image_features(inputs["pixel_values"])[0]
            length = inputs["input_ids"].shape[1]
            told["ids"][name] = network.generate(**inputs, **GREEDY)[0, length:].tolist()
        batch = data.batch("batch_left")
        tensors["batch_left.logits"] = network(**batch).logits
        for kind in ({}, {"cache_implementation": "static"}):
            ids = network.generate(**batch, **kind, **GREEDY)[:, batch["input_ids"].shape[1] :]
            told["ids"][f"batch_left {kind}"] = ids.tolist()
    told |= talk(vlm, data)
    half = lavish.load(checkpoint, device="cpu", dtype="bfloat16", parallel="tensor")
    told["bfloat16"] = half.chat(told["messages"], max_new_tokens=10).token_ids
    tensors["uneven.output"] = gathered(torch.arange(10.0)[:, None])
    try:
        network.save_pretrained(folder / "saved")
    except ConfigError as error:
        told["save"] = str(error)
    told["has_saved"] = (folder / "saved").exists()
    try:
        network.state_dict()
    except ConfigError as error:
        told["state"] = str(error)
    told["is_trainable"] = any(parameter.requires_grad for parameter in network.parameters())
    if dist.world_size() == 2:  # among 4, equal blocks do not even have the shape of heads
        parallel.head_spans = equal_blocks
        wrong = lavish.load(checkpoint, device="cpu", parallel="tensor").model
        with torch.no_grad():
            tensors["equal_blocks.logits"] = wrong(**data.inputs("chat_image")).logits[0]
    return tensors, told


def talk(vlm, data) -> dict:
    """What a user does: chat, batch, sampling with and without a seed, and the step with a static cache."""
    prompts = json.loads((data.folder / "inputs/prompts.json").read_text())["prompts"]
    asked = [prompt for prompt in prompts if prompt["template_version"] == "chat"]
    conversations = [to_messages(prompt, data.folder / "inputs") for prompt in asked]
    drawn = [vlm.chat(conversations[0], temperature=2.0, max_new_tokens=10).token_ids for _ in range(2)]
    rows = vlm.batch(conversations[:1] * 2, temperature=2.0, max_new_tokens=10)
    options = {"max_new_tokens": 10, "chat_template": "chat"}
    step = StaticStep(vlm.model, 128, is_graphed=False)
    prompt = vlm._prompt(conversations[0], lavish.inference.vlm.parse_options({}))
    logits, static_ids = step.prefill(prompt, vlm._features([prompt])), []
    for _ in range(10):
        static_ids.append(int(logits[0].argmax()))
        logits = step.decode(static_ids[-1])
    return {
        "asked": [prompt["id"] for prompt in asked],
        "messages": conversations[0],
        "chat": [vlm.chat(messages, **options).token_ids for messages in conversations],
        "batch": [reply.token_ids for reply in vlm.batch(conversations, **options)],
        "drawn": drawn + [reply.token_ids for reply in rows],
        "seeded": vlm.chat(conversations[0], temperature=2.0, max_new_tokens=10, seed=5).token_ids,
        "static": static_ids,
        "cache_bytes": sum(kept.cache.num_bytes for kept in vlm.conversations._kept),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    found, told = run(sys.argv[1], folder)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{dist.rank()}.safetensors")
    (folder / f"{dist.rank()}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
