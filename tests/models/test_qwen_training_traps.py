"""Faults of the two Qwen releases' trainings that ours must not have: CLIP + Qwen 15 and 16, MiniGPT4-Qwen 11.

Elsewhere: every answer of a caption file is kept (tests/datasets/test_formats.py, `image_map`); several turns train
each answer, and loading twice gives two networks (test_clip_qwen_traps.py).
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_lavis
import torch
from clip_qwen_fixture import RELEASE
from minigpt4_qwen_fixture import HEADS, PIECES, TRAINED
from omegaconf import OmegaConf

from lavish.common.errors import DataError
from lavish.common.registry import registry
from lavish.datasets.formats.checking import check_data
from lavish.datasets.formats.opening import open_data
from lavish.runners.recipe import open_recipe, train

# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def run(folder: Path, model: dict[str, Any], datasets: dict[str, Any], **keys: Any) -> Path:
    settings = {"batch_size_train": 2, "log_freq": 1, "device": "cpu", "runner": "runner_iter", "weight_decay": 0}
    content = {
        "model": model,
        "datasets": datasets,
        "run": {"task": "image_text_pretrain", "output_dir": str(folder / "out"), **settings, **keys},
    }
    return train(open_recipe(tiny_lavis.write(folder, content))).popitem()[1]


# -- CLIP + Qwen 15: pairs of one picture, pictures that cannot be read


def caption_folder(folder: Path, *, broken: bool) -> Path:
    """Three pairs about one picture, as the release's map would have them under one name, and one of a bad file."""
    tiny_lavis.draw(folder, 1)
    names = {f"pair{at}": {"iamge_file": tiny_lavis.name(0), "ID": at, "path": f"{folder}/"} for at in range(3)}
    if broken:
        (folder / "bad.jpg").write_bytes(b"no picture")
        names["pair3"] = {"iamge_file": "bad.jpg", "ID": 3, "path": f"{folder}/"}
    answers = ("red", "a square", "nothing", "?")
    captions = {str(at): {"q": f"question {at}<|extra_0|>", "a": [answers[at]]} for at in range(len(names))}
    tiny_lavis.write_json(folder / "image_map.json", names)
    tiny_lavis.write_json(folder / "captions.json", captions)
    return folder


def conversations(folder: Path, **section: Any) -> Any:
    info = {"annotations": {"train": {"storage": str(folder)}}}
    config = OmegaConf.create({"data_type": "images", "build_info": info, **section})
    return registry.get_builder_class("conversations")(config).build_datasets()["train"]


def test_clip_qwen_15_pairs_of_one_picture_are_all_kept(tmp_path: Path) -> None:
    dataset = conversations(caption_folder(tmp_path, broken=False))
    assert [sample["messages"][-1]["content"] for sample in dataset] == ["red", "a square", "nothing"]


def test_clip_qwen_15_a_bad_picture_is_told_or_left_out_by_option(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = caption_folder(tmp_path, broken=True)
    report = check_data(open_data(folder))
    assert (report.num_rows, report.num_bad) == (4, 1)
    clip = {"arch": "chat", "model_type": "default", "path": str(RELEASE), "train": ["projector"]}
    with pytest.raises(DataError, match=r"image_map\.json, 'pair3': .*bad\.jpg"):
        run(
            tmp_path,
            clip,
            {"conversations": {"build_info": {"annotations": {"train": {"storage": str(folder)}}}}},
            max_iters=4,
            batch_size_train=1,
        )
    dataset = conversations(folder, max_broken=0.5)
    with caplog.at_level(logging.WARNING):
        found = [dataset[at]["messages"][-1]["content"] for at in range(4)]
    assert len(found) == 4
    assert "?" not in found
    assert "bad.jpg" in caplog.text
    assert dataset.num_broken == 1


# -- CLIP + Qwen 16: a length limit, an evaluation, an adapter that learns on


def test_clip_qwen_16_samples_over_a_length_are_told(tmp_path: Path) -> None:
    source = open_data(caption_folder(tmp_path, broken=False))
    processor = registry.get_model_class("chat").from_config({"path": str(RELEASE), "train": ["projector"]}).processor
    assert check_data(source, processor=processor, max_length=80).num_bad == 0
    report = check_data(source, processor=processor, max_length=20)
    assert report.num_bad == 3
    assert "20 are the most" in report.problems[0][1]


def test_clip_qwen_16_a_trained_adapter_learns_on(tmp_path: Path) -> None:
    """From the folder that was trained, under its own numbers and not new ones."""
    model = registry.get_model_class("chat").from_config({"path": str(RELEASE), "train": ["lora", "projector"]})
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    stored = torch.load(RELEASE / "checkpoint-27000/adapter_model.bin", weights_only=True)
    down = stored["base_model.model.transformer.h.0.mlp.w1.lora_A.weight"]
    assert any(torch.equal(value, down) for value in before.values())
    folder = caption_folder(tmp_path, broken=False)
    section = {"conversations": {"build_info": {"annotations": {"train": {"storage": str(folder)}}}}}
    clip = {"arch": "chat", "model_type": "default", "path": str(RELEASE), "train": ["lora", "projector"]}
    out = run(tmp_path, clip, section, max_iters=1, init_lr=1e-3, lr_sched="constant_lr", batch_size_train=3)
    held = torch.load(next(out.glob("*_last.pth")), weights_only=True)["model"]
    assert held.keys() == before.keys()
    assert all((held[name] != value).float().mean() > 0.9 for name, value in before.items())


# -- MiniGPT4-Qwen 11: the rate of the first update


def test_minigpt4_qwen_11_the_first_update_is_made_at_the_rate_of_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the release the schedule is asked after the step, so the first one is made at the full rate."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.extend({group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    rows = [
        {"image": tiny_lavis.name(at), "instruction": "<Img><ImageHere></Img> What?", "output": "That."}
        for at in range(2)
    ]
    images = {"storage": str(tiny_lavis.draw(tmp_path / "images", 2))}
    path = tiny_lavis.write_json(tmp_path / "rows.json", rows)
    data = {
        "build_info": {"annotations": {"train": {"url": None, "md5": None, "storage": path}}, "images": images},
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": 56}},
        "text_processor": {"train": {"name": "base_instruction"}},
    }
    pieces = {name: str(value) for name, value in PIECES.items()}
    model = {"arch": "minigpt4qwen", "model_type": "qwen7b_chat", "finetuned": str(TRAINED), **pieces, **HEADS}
    rate = {"init_lr": 0.01, "warmup_lr": 0.0, "warmup_steps": 2, "max_iters": 4, "lr_sched": "linear_warmup_cosine_lr"}
    out = run(tmp_path, model, {"minigpt4_instruction": data}, **rate)
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.0], abs=1e-9)
    logged = [json.loads(line)["lr"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert logged == pytest.approx(rates)
