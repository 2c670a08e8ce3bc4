"""Every recipe of projects/*/train runs: on the tiny model of its family, with small local data, for two steps."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_lavis
from video_clip import clip

from lavish.common.errors import ConfigError
from lavish.runners.recipe import check, open_recipe, run_config, train

pytest.importorskip("peft")
PROJECTS = Path(__file__).resolve().parents[2] / "projects"
LEARNING = ("scenes", "new_colour")
"""How the recipes are called that draw their data; they have tests of their own (tests/test_scenes_recipes.py ...)."""
RECIPES = sorted(
    str(path.relative_to(PROJECTS)) for path in PROJECTS.glob("*/train/*.yaml") if not path.stem.startswith(LEARNING)
)
FIXTURES = tiny_lavis.FIXTURES
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def files(**storage: Any) -> dict[str, Any]:
    return {split: {"url": None, "md5": None, "storage": path} for split, path in storage.items()}


def sized(name: str, size: int, splits: tuple[str, ...] = ("train", "eval")) -> dict[str, Any]:
    return {f"datasets.{name}.vis_processor.{split}.image_size": size for split in splits}


def captions(folder: Path) -> dict[str, Any]:
    section = tiny_lavis.caption_section(folder)
    model = tiny_lavis.blip_section(folder, "blip_caption", "base_coco")
    del model["arch"], model["model_type"]
    model["load_finetuned"] = True
    return {
        **{f"model.{key}": value for key, value in model.items()},
        "datasets.coco_caption.build_info": section["build_info"],
        **sized("coco_caption", tiny_lavis.SIZE),
        "run.sample_generations": 1,
    }


def questions(folder: Path) -> dict[str, Any]:
    write = tiny_lavis.write_json
    rows = [
        {
            "image": tiny_lavis.name(at),
            "question": "What colour?",
            "question_id": at,
            "answer": ["red"] * 10,
            "dataset": "vqa",
        }
        for at in range(3)
    ]
    vg = [{**row, "answer": "red", "dataset": "vg"} for row in rows]
    answers = write(folder / "answers.json", ["red", "green"])
    asked = {"questions": [{"question_id": row["question_id"], "image_id": 0, "question": "?"} for row in rows]}
    told = {
        "annotations": [
            {
                "question_id": row["question_id"],
                "image_id": 0,
                "question_type": "what",
                "answer_type": "other",
                "answers": [{"answer": "red", "answer_id": 1, "answer_confidence": "yes"}] * 10,
            }
            for row in rows
        ]
    }
    val = [write(folder / "val.json", rows), answers, write(folder / "q.json", asked), write(folder / "a.json", told)]
    train_file = write(folder / "train.json", rows)
    model = tiny_lavis.blip_section(folder, "blip_vqa", "vqav2")
    del model["arch"], model["model_type"]
    model["load_finetuned"] = True
    images = {"storage": str(tiny_lavis.draw(folder / "images"))}
    test = files(train=[train_file], val=val, test=[write(folder / "test.json", rows), answers])
    return {
        **{f"model.{key}": value for key, value in model.items()},
        "datasets.coco_vqa.build_info": {"annotations": test, "images": images},
        "datasets.vg_vqa.build_info": {"annotations": files(train=write(folder / "vg.json", vg)), "images": images},
        **sized("coco_vqa", tiny_lavis.SIZE),
        **sized("vg_vqa", tiny_lavis.SIZE, ("train",)),
        "run.num_ans_candidates": 2,
        "run.sample_generations": 1,
    }


def dialogues(folder: Path) -> dict[str, Any]:
    """Two dialogues about features that are drawn here."""
    checkpoint = FIXTURES / "gpt_dialogue/open/checkpoint"
    widths = {"i3d_flow": 6, "i3d_rgb": 6, "vggish": 4}
    random = np.random.default_rng(0)
    for name, width in widths.items():
        (folder / "features" / name).mkdir(parents=True, exist_ok=True)
        for video in ("a", "b"):
            np.save(folder / "features" / name / f"{video}.npy", random.random((5, width), dtype=np.float32))
    turns = [{"question": "what is it ?", "answer": "a cat"}, {"question": "where ?", "answer": "on a mat"}]
    data = {
        "dialogs": [{"image_id": video, "caption": "a cat", "summary": "it sits", "dialog": turns} for video in "ab"]
    }
    path = tiny_lavis.write_json(folder / "dialogs.json", data)
    processors = {
        f"datasets.avsd_dialogue.{kind}.{split}.tokenizer": str(checkpoint / "gpt2")
        for kind in ("vis_processor", "text_processor")
        for split in ("train", "eval")
    }
    sizes = json.loads((checkpoint / "gpt2" / "config.json").read_text())
    fields = {name: sizes[name] for name in ("n_embd", "n_layer", "n_head", "n_positions")}
    return {
        **{f"model.{key}": value for key, value in fields.items()},
        "model.pretrained": str(checkpoint / "gpt2"),
        "model.load_pretrained": False,
        "model.vocab_size": sizes["vocab_size"],
        "model.len_video_ft": sum(widths.values()),
        "datasets.avsd_dialogue.build_info": {
            "annotations": files(train=path, val=path, test=path),
            "features": {"storage": str(folder / "features")},
        },
        **processors,
        "run.sample_generations": 1,
    }


def instructions(*names: str, trained: bool = True):
    """Rows about a picture for each of the data sets; without `trained` the projector starts random."""
    checkpoint = FIXTURES / "minigpt4qwen/open/checkpoint"

    def values(folder: Path) -> dict[str, Any]:
        asked = {"instruction": "<Img><ImageHere></Img> What?", "output": "That."}
        pictures = tiny_lavis.draw(folder / "images")
        build: dict[str, Any] = {}
        for name in names:
            rows = [{"image": tiny_lavis.name(at), **asked} for at in range(4)]
            if name == "videochatgpt_100k":
                (pictures / "clip.mp4").write_bytes(clip(3, size=32))
                rows = [{"video": "clip.mp4", **asked}]
            path = tiny_lavis.write_json(folder / f"{name}.json", rows)
            build[name] = {"annotations": files(train=path), "images": {"storage": str(pictures)}}
            build[name] |= {"max_frames": 2} if name == "videochatgpt_100k" else {}
        return {
            "model.finetuned": str(checkpoint / "checkpoint_9.pth") if trained else None,
            "model.eva": str(checkpoint / "eva/eva_vit_g.pth"),
            "model.blip2": str(checkpoint / "blip2/blip2_pretrained_flant5xxl.pth"),
            "model.qformer": str(checkpoint / "bert-base-uncased"),
            "model.llm": str(FIXTURES / "qwen/llm"),
            "model.vision_config": {"num_attention_heads": 4},
            **{f"datasets.{name}.build_info": section for name, section in build.items()},
            **{key: value for name in names for key, value in sized(name, 56, ("train",)).items()},
            "run.accum_grad_iters": 2,
            "run.warmup_steps": 0,
        }

    return values


def conversations(path: str, **model: Any):
    def values(folder: Path) -> dict[str, Any]:
        from test_chat_learner import rows

        return {
            "model.path": str(FIXTURES / path),
            "model.tokenizer": None,
            **{f"model.{key}": value for key, value in model.items()},
            "datasets.conversations.build_info": {
                "annotations": {"train": {"storage": rows(folder)}},
                "images": {"storage": str(folder / "images")},
            },
        }

    return values


TINY = {
    "blip/train/caption_coco_ft.yaml": captions,
    "blip/train/caption_coco_large_ft.yaml": captions,
    "blip/train/vqav2_ft.yaml": questions,
    "clip_qwen/train/lora_projector.yaml": conversations("clip_qwen/open/checkpoint"),
    "cogvlm/train/captcha_lora.yaml": conversations("cogvlm/open/checkpoint"),
    "cogvlm2/train/lora.yaml": conversations("cogvlm2/open/checkpoint"),
    "cogvlm2/train/qlora.yaml": conversations("cogvlm2/open/checkpoint"),
    "glm4v_9b/train/lora.yaml": conversations("glm4v/open/checkpoint"),
    "glm4v_9b/train/sft.yaml": conversations("glm4v/open/checkpoint"),
    "gpt_dialogue/train/dialogue_avsd_ft.yaml": dialogues,
    "minigpt4_qwen/train/instruction_tuning.yaml": instructions("minigpt4_instruction", "llava_instruction"),
    "minigpt4_qwen/train/pretrain.yaml": instructions("llava_pretrain", trained=False),
    "minigpt4_qwen/train/sft.yaml": instructions("llava_instruct_156k", "videochatgpt_100k"),
}


def test_every_recipe_is_here() -> None:
    assert sorted(TINY) == RECIPES


@pytest.mark.parametrize("family", ["blip", "glm4v_9b", "minigpt4_qwen", "gpt_dialogue"])
def test_a_misspelt_key_of_the_model_is_found_before_anything_is_fetched(family: str) -> None:
    name = next(name for name in RECIPES if name.startswith(f"{family}/"))
    with pytest.raises(ConfigError, match="pretrainde"):
        check(open_recipe(PROJECTS / name, ["model.pretrainde=x"]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    if "qlora" in name and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    run = {
        "run.output_dir": str(tmp_path / "out"),
        "run.max_epoch": 1,
        "run.max_iters": 2,
        "run.batch_size_train": 2,
        "run.batch_size_eval": 2,
        "run.num_workers": 0,
        "run.log_freq": 1,
        "run.device": "cpu",
    }
    recipe = open_recipe(PROJECTS / name, overrides({**run, "run.warmup_steps": 0, **TINY[name](tmp_path)}))
    (out,) = train(recipe).values()
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert logged
    assert all(line["loss"] > 0 for line in logged)
    scored = out / "validations.jsonl"
    splits = {json.loads(line)["split"] for line in scored.read_text().splitlines()} if scored.exists() else set()
    keys = run_config(recipe)
    assert splits == {*keys.valid_splits, *keys.test_splits}
    if keys.sample_generations:
        said = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in said] == ["before", 0]
        assert all(row["reference"] in ("a red square | a square that is red", "red", "on a mat") for row in said)
        assert all((row["question"] is None) == ("caption" in name) for row in said)
        assert all((row["picture"] is None) == ("dialogue" in name) for row in said)
