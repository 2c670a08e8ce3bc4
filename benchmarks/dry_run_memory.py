"""What `lavish train --dry-run` says of memory against the peak of the run itself, for recipes of several kinds.

Each estimate and each run is a process of its own. On a CPU the peak is that of resident memory while the run trains
and saves, over what the process held before its model was built (a tiny run of the same kind has imported and set up
all that stays; `_memory.py`). On a GPU it is torch.cuda.max_memory_allocated. Networks have random weights, and
pictures are drawn: nothing is fetched. Goal: within 15 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _measure as measure
import _memory as memory
import torch

GOAL = 0.15
PROJECTS = Path(__file__).resolve().parent.parent / "projects"
NUM_STEPS = 3
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "BLIP caption, all": ("blip", {}, {"batch_size_train": 4}),
    "BLIP caption, all, batch 16, checkpointing": (
        "blip",
        {},
        {"batch_size_train": 16, "activation_checkpointing": True},
    ),
    "BLIP caption, all, bf16, 2 passes": ("blip", {}, {"batch_size_train": 4, "amp": True, "accum_grad_iters": 2}),
    "chat, LoRA": ("chat", {"lora": {"r": 8}}, {"batch_size_train": 4}),
    "chat, LoRA, bf16 weights": ("chat", {"lora": {"r": 8}, "dtype": "bfloat16"}, {"batch_size_train": 4}),
    "chat, LoRA, bf16 weights, checkpointing": (
        "chat",
        {"lora": {"r": 8}, "dtype": "bfloat16"},
        {"batch_size_train": 8, "activation_checkpointing": True},
    ),
    "chat, all": ("chat", {"train": ["all"]}, {"batch_size_train": 4}),
    "chat, all, mean of weights": ("chat", {"train": ["all"]}, {"batch_size_train": 2, "ema_decay": 0.99}),
}
"""Name -> kind of model, keys of `model`, keys of `run`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--size", choices=("100m", "tiny"), default="100m", help="tiny: for the test of this script")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--child", choices=("estimate", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu" and sys.platform != "linux":
        parser.error("the peak of resident memory is read from /proc, which is of Linux; use --device cuda.")
    if options.child:
        torch.set_num_threads(options.threads or 1)
        found = CHILDREN[options.child](options.cases[0], options.size, options.device)
        print(json.dumps(found))
        return 0
    measure.set_up(options)
    print(f"{'':44} {'estimate':>9} {'peak':>9}   ratio   weights, states, a pass")
    ratios = []
    for name in options.cases:
        estimate = child("estimate", name, options)
        peak = child("run", name, options)["bytes"]
        ratios.append(estimate["bytes"] / peak)
        parts = ", ".join(f"{estimate[part] / 1e6:.0f}" for part in ("weights", "states", "pass"))
        print(f"{name:44} {estimate['bytes'] / 1e6:6.0f} MB {peak / 1e6:6.0f} MB   {ratios[-1]:.2f}    {parts} MB")
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(measure.verdict("furthest from the peak", worst * 100, GOAL * 100, "%", is_lower_better=True))
    return 0


def child(kind: str, name: str, options: argparse.Namespace) -> dict[str, int]:
    """Run one estimate or one training in a process of its own."""
    arguments = ["--child", kind, "--cases", name, "--size", options.size, "--device", options.device]
    return memory.in_a_process(__file__, [*arguments, "--threads", str(torch.get_num_threads())])


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipe(name: str, size: str, device: str, folder: Path) -> Any:
    """Give the merged config of a case, as `lavish train` has it."""
    from omegaconf import OmegaConf

    from lavish.runners.recipe import check, open_recipe

    kind, model, run = CASES[name]
    content = (blip if kind == "blip" else chat)(size, folder)
    content["model"] |= model
    accumulated = run.get("accum_grad_iters", 1)
    samples = {"num_samples": NUM_STEPS * run["batch_size_train"] * accumulated, "seed": 1}
    (data,) = content["datasets"].values()
    data["build_info"] = {"annotations": {"train": samples, "val": None, "test": None}, **data.pop("build_info", {})}
    content["run"] |= {
        "runner": "runner_base",
        "max_epoch": 1,
        "init_lr": 1e-4,
        "log_freq": 1,
        "num_workers": 0,
        "train_splits": ["train"],
        "device": device,
        "output_dir": str(folder / "out"),
        **run,
    }
    path = folder / "recipe.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    ((_, config),) = check(open_recipe(path))
    return config


def blip(size: str, folder: Path) -> dict[str, Any]:
    """A BLIP that captions pictures of 224 x 224: 65 million parameters."""
    width, depth, side = (512, 8, 224) if size == "100m" else (96, 2, 64)
    tiny = json.loads((PROJECTS / "blip/tiny/med_config.json").read_text(encoding="utf-8"))
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "encoder_width": width}
    path = folder / "med_config.json"
    path.write_text(json.dumps({**tiny, **sizes, "num_attention_heads": width // 32}), encoding="utf-8")
    processor = {"train": {"name": "blip_image_eval", "image_size": side}}
    return {
        "model": {
            "arch": "blip_caption",
            "model_type": "base_coco",
            "load_finetuned": False,
            "load_pretrained": False,
            "image_size": side,
            "tokenizer": str(PROJECTS / "blip/tiny"),
            "med_config_path": str(path),
            "vision_config": {
                "hidden_size": width,
                "num_hidden_layers": depth,
                "num_attention_heads": width // 32,
                "intermediate_size": 4 * width,
                "patch_size": 16,
            },
        },
        "datasets": {
            "scenes_caption": {
                "vis_processor": processor,
                "text_processor": {"train": {"name": "blip_caption", "prompt": "a picture of "}},
            }
        },
        "run": {"task": "captioning", "valid_splits": [], "test_splits": []},
    }


def chat(size: str, folder: Path) -> dict[str, Any]:
    """A GLM-4V of 96 million parameters that talks about pictures of 128 x 128 (64 tokens)."""
    place = PROJECTS / "glm4v_9b/tiny"
    fields = json.loads((place / "config.json").read_text(encoding="utf-8"))
    wide: dict[str, Any] = {}
    if size == "100m":
        wide = {
            "num_layers": 12,
            "hidden_size": 768,
            "ffn_hidden_size": 2048,
            "kv_channels": 64,
            "num_attention_heads": 12,
            "vision_config": {**fields["vision_config"], "hidden_size": 384, "num_heads": 6, "image_size": 128},
        }
    side = (wide or fields)["vision_config"]["image_size"]
    return {
        "model": {"arch": "chat", "model_type": "default", "path": str(place), "init": "random", "config": wide},
        "datasets": {"scenes_conversations": {"build_info": {"scene": {"image_size": side}, "turns": 2}}},
        "run": {"task": "image_text_pretrain"},
    }


# -- the two sides -----------------------------------------------------------------------------------------------------


def estimate(name: str, size: str, device: str) -> dict[str, int]:
    from lavish.runners.dry_run import plan

    with TemporaryDirectory() as folder:
        said = plan(recipe(name, size, device, Path(folder)))
    parts = {"weights": said.total("weight_bytes"), "states": said.total("optimizer_bytes"), "pass": said.pass_bytes}
    return {"bytes": said.memory_bytes, **parts}


def run(name: str, size: str, device: str) -> dict[str, int]:
    from lavish.runners.dry_run import _runner

    def train(size: str) -> None:
        with TemporaryDirectory() as folder:
            runner = _runner(recipe(name, size, device, Path(folder)))
            memory.forget_peak(device)
            runner.train()

    train("tiny")  # all that stays in a process has come
    before = memory.held(device)
    train(size)
    return {"bytes": memory.peak(device) - before}


CHILDREN = {"estimate": estimate, "run": run}


if __name__ == "__main__":
    sys.exit(main())
