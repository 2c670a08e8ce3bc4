"""The pocket model's recipe, shrunk: 4 x 4 patches, one layer each, two steps a stage."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavish.runners.recipe import load_recipe

RECIPE: dict[str, Any] = {
    "model": {
        "arch": "cogvlm",
        "config": {
            "vocab_size": 0,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_multi_query_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "vision_config": {
                "image_size": 16,
                "patch_size": 4,
                "hidden_size": 112,
                "num_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 32,
            },
        },
    },
    "datasets": {
        "scenes": {"num_samples": 6, "num_conversations": 3, "max_text_tokens": 80, "num_questions": 7},
    },
    "run": {
        "task": "scenes",
        "optimizer": "muon",
        "muon_lr": 0.01,
        "init_lr": 0.002,
        "max_iters": 2,
        "batch_size_train": 2,
        "batch_size_eval": 4,
        "log_freq": 2,
        "save_freq": 1,
        "device": "cpu",
    },
    "stages": [
        {"name": "tower", "task": {"stage": "tower"}},
        {"name": "decoder", "task": {"stage": "decoder"}},
        {"name": "joint", "task": {"stage": "joint", "tower_from": "tower", "decoder_from": "decoder"}},
    ],
}


def write(folder: Path) -> Path:
    """Write the recipe into a folder; its output goes beside it."""
    path = folder / "recipe.yaml"
    OmegaConf.save(OmegaConf.merge(RECIPE, {"run": {"output_dir": str(folder / "out")}}), path)
    return path


def recipe(folder: Path, *overrides: str) -> DictConfig:
    """Give the recipe with dotted overrides; outputs go to `folder / "out"`."""
    return load_recipe(write(folder), list(overrides))


def evaluation(folder: Path, model: Path | None, *overrides: str) -> DictConfig:
    """Give the recipe of its evaluation, into `folder / "out" / "evaluation"`."""
    scenes = {"num_questions": 7, "questions_per_picture": 3, "picture_sizes": [112, 48], "seed": 77}
    config = {
        "model": {"path": None if model is None else str(model)},
        "datasets": {"scenes": scenes},
        "run": {
            "task": "scenes",
            "batch_size_eval": 4,
            "device": "cpu",
            "output_dir": str(folder / "out" / "evaluation"),
        },
    }
    path = folder / "evaluate.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    return load_recipe(path, list(overrides))
