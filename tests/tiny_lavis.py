"""LAVIS recipes on tiny models: BLIP as its fixture has it, on pictures and captions drawn here."""

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

FIXTURES = Path(__file__).resolve().parent / "fixtures"
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "yellow": (200, 200, 30)}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIZE = 64


def name(number: int) -> str:
    return f"val2014/COCO_val2014_{number:012d}.jpg"


def draw(folder: Path, count: int = 6) -> Path:
    """Draw `count` pictures of one colour each under a folder of images, and give it."""
    for number in range(count):
        path = folder / name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), list(COLORS.values())[number % len(COLORS)]).save(path)
    return folder


def write_json(path: Path, value: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def caption_section(folder: Path, count: int = 6) -> dict[str, Any]:
    """Give the section `coco_caption` of a recipe, with its files in a folder."""
    colors = list(COLORS)
    train = [
        {"image": name(at), "image_id": f"coco_{at}", "caption": f"a {colors[at % len(colors)]} square"}
        for at in range(count)
    ]
    held = [
        {"image": name(at), "caption": [f"a {colors[at]} square", f"a square that is {colors[at]}"]} for at in range(3)
    ]
    files = {
        split: {"url": None, "md5": None, "storage": write_json(folder / f"{split}.json", rows)}
        for split, rows in (("train", train), ("val", held), ("test", held[:2]))
    }
    return {
        "build_info": {"annotations": files, "images": {"storage": str(draw(folder / "images", count))}},
        "vis_processor": {
            "train": {"name": "blip_image_train", "image_size": SIZE},
            "eval": {"name": "blip_image_eval", "image_size": SIZE},
        },
        "text_processor": {
            "train": {"name": "blip_caption", "prompt": "a picture of "},
            "eval": {"name": "blip_caption"},
        },
    }


def blip_section(folder: Path, arch: str, model_type: str, dropout: float = 0.1) -> dict[str, Any]:
    """Give the section `model` of a tiny BLIP, whose files are copied to `folder / "blip"`."""
    source = FIXTURES / arch / "open" / "checkpoint"
    target = folder / "blip"
    if not target.exists():
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    med = json.loads((source / "med_config.json").read_text())
    med |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    write_json(target / "med_config.json", med)
    return {
        "arch": arch,
        "model_type": model_type,
        "finetuned": str(next(target.glob("*.pth"))),
        "tokenizer": str(target / "bert-base-uncased"),
        "image_size": SIZE,
        "max_txt_len": 20,
        "vision_config": SIZES,
    }


def caption_recipe(folder: Path, *, dropout: float = 0.1, count: int = 6, **run: Any) -> dict[str, Any]:
    """Give a recipe that fine-tunes a tiny BLIP on captions; outputs go to `folder / "out"`."""
    return {
        "model": blip_section(folder, "blip_caption", "base_coco", dropout),
        "datasets": {"coco_caption": caption_section(folder, count)},
        "run": {
            "task": "captioning",
            "init_lr": 1e-3,
            "min_lr": 0,
            "max_epoch": 2,
            "batch_size_train": 2,
            "batch_size_eval": 2,
            "num_workers": 0,
            "max_len": 12,
            "min_len": 3,
            "num_beams": 1,
            "log_freq": 1,
            "seed": 42,
            "train_splits": ["train"],
            "valid_splits": ["val"],
            "test_splits": ["test"],
            "device": "cpu",
            "output_dir": str(folder / "out"),
            **run,
        },
    }


def write(folder: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as YAML and give its path."""
    path = folder / "recipe.yaml"
    OmegaConf.save(OmegaConf.create(recipe), path)
    return path
