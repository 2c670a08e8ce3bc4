"""Captions and questions of the zoo, from small local files: samples, batches, one training step of BLIP."""

import json
from pathlib import Path

import pytest
import torch
import zoo_files

from lavish.common.config import Config
from lavish.common.errors import DataError
from lavish.common.registry import registry
from lavish.datasets.builders import dataset_zoo, load_dataset
from lavish.datasets.datasets.base_dataset import ConcatDataset
from lavish.datasets.datasets.vg_vqa_datasets import VGVQADataset
from lavish.datasets.datasets.vqa_datasets import VQAEvalDataset
from lavish.models import load_model

PROCESSORS = {
    "vis_processor": {
        "train": {"name": "blip_image_train", "image_size": 8},
        "eval": {"name": "blip_image_eval", "image_size": 8},
    },
    "text_processor": {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}},
}


def build(name: str, root: Path, **section: object) -> dict:
    """Build a dataset as a recipe does: the default config under what a recipe says."""
    recipe = {"datasets": {name: {"build_info": {"images": {"storage": str(root)}}, **PROCESSORS, **section}}}
    return registry.get_builder_class(name)(Config(recipe).datasets_cfg[name]).build_datasets()


def test_the_tutorials_first_data_set(cache: Path, tmp_path: Path) -> None:
    zoo_files.coco_caption(cache)
    coco = load_dataset("coco_caption", vis_path=zoo_files.pictures(tmp_path / "pictures"))
    assert list(coco) == ["train", "val", "test"]
    assert [len(split) for split in coco.values()] == [3, 2, 1]
    assert coco["train"].annotation[0] == {**zoo_files.captions()[0], "instance_id": "0"}
    sample = coco["train"][0]
    assert sample["image"].size == (20, 16), "without a processor a picture stays one"
    assert (sample["text_input"], sample["image_id"]) == ("A red square.", 0)
    assert "coco_caption" in dataset_zoo.get_names()
    assert dataset_zoo["coco_vqa"] == ["default", "eval"]
    assert "coco_vqa" in str(dataset_zoo)


def test_captions(cache: Path, tmp_path: Path) -> None:
    zoo_files.coco_caption(cache)
    coco = build("coco_caption", zoo_files.pictures(tmp_path / "pictures"))
    batch = coco["train"].collater([coco["train"][index] for index in range(3)])
    assert set(batch) == {"image", "text_input", "image_id"}
    assert batch["image"].shape == (3, 3, 8, 8)
    assert batch["text_input"] == ["a red square", "something red", "a green square"]
    assert batch["image_id"] == [0, 0, 1], "pictures are numbered as they appear"
    batch = coco["val"].collater([coco["val"][index] for index in range(2)])
    assert set(batch) == {"image", "image_id", "instance_id"}
    assert (batch["image_id"], batch["instance_id"]) == ([133, 139], ["0", "1"])


def test_a_coco_name_without_a_number(cache: Path, tmp_path: Path) -> None:
    zoo_files.coco_caption(cache)
    zoo_files.write(cache / "coco/annotations/coco_karpathy_val.json", [{"image": "val2014/jpg.jpg"}])
    root = zoo_files.pictures(tmp_path / "pictures", ("val2014/jpg.jpg",))
    with pytest.raises(DataError, match=r"coco_karpathy_val\.json, row 1: .*ends with its number"):
        build("coco_caption", root)["val"][0]


def test_nocaps(cache: Path, tmp_path: Path) -> None:
    for split in ("val", "test"):
        zoo_files.write(cache / f"nocaps/annotations/nocaps_{split}.json", [{"image": zoo_files.NAMES[0], "img_id": 7}])
    datasets = build("nocaps", zoo_files.pictures(tmp_path))
    assert list(datasets) == ["val", "test"]
    assert {key: datasets["val"][0][key] for key in ("image_id", "instance_id")} == {"image_id": 7, "instance_id": "0"}


def test_questions(cache: Path, tmp_path: Path) -> None:
    zoo_files.coco_vqa(cache)
    vqa = build("coco_vqa", zoo_files.pictures(tmp_path))
    assert [len(split) for split in vqa.values()] == [4, 2, 2], "trained on two files"
    sample = vqa["train"][0]
    assert set(sample) == {"image", "text_input", "answers", "weights"}
    assert (sample["answers"], sample["weights"]) == (["red", "dark red"], [0.6, 0.4])
    batch = vqa["train"].collater([sample, vqa["train"][1]])
    assert set(batch) == {"image", "text_input", "answer", "weight", "n_answers"}
    assert batch["answer"] == ["red", "dark red", "green"]
    assert torch.equal(batch["weight"], torch.tensor([0.6, 0.4, 1.0])), "a tensor, which BLIP's forward needs"
    assert torch.equal(batch["n_answers"], torch.tensor([2, 1]))
    val = vqa["val"]
    assert set(val[0]) == {"image", "text_input", "question_id", "instance_id"}
    assert val.collater([val[0], val[1]])["question_id"] == [100, 101]
    assert val.answer_list == ["red", "green", "dark red"]
    assert "questions" in Path(val.coco_fmt_qust_file).name
    assert "annotations" in Path(val.coco_fmt_anno_file).name
    assert vqa["test"].coco_fmt_qust_file is None


def test_the_two_coco_files_in_the_other_order(tmp_path: Path) -> None:
    zoo_files.coco_vqa(tmp_path)
    names = ("vqa_val_eval", "answer_list", "v2_mscoco_val2014_annotations", "v2_OpenEnded_mscoco_val2014_questions")
    val = VQAEvalDataset(ann_paths=[tmp_path / f"coco/annotations/{name}.json" for name in names])
    assert Path(val.coco_fmt_qust_file).stem == names[3]
    assert Path(val.coco_fmt_anno_file).stem == names[2]


def test_the_types_of_coco_vqa(cache: Path, tmp_path: Path) -> None:
    zoo_files.coco_vqa(cache)
    assert list(build("coco_vqa", tmp_path, type="eval")) == ["val"]


def test_ok_vqa(cache: Path, tmp_path: Path) -> None:
    folder = cache / "okvqa" / "annotations"
    zoo_files.write(folder / "okvqa_train.json", zoo_files.questions())
    zoo_files.write(folder / "vqa_val_eval.json", zoo_files.questions())
    zoo_files.write(folder / "answer_list.json", ["red"])
    for name in ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations"):
        zoo_files.write(folder / f"{name}.json", {})
    datasets = build("ok_vqa", zoo_files.pictures(tmp_path))
    assert list(datasets) == ["train", "test"]
    assert datasets["train"][0]["answers"] == ["red", "dark red"]
    assert Path(datasets["test"].coco_fmt_anno_file).name == "mscoco_val2014_annotations.json"


def test_aok_vqa(cache: Path, tmp_path: Path) -> None:
    folder = cache / "aokvqa" / "annotations"
    row = {"image": zoo_files.NAMES[0], "question": "Why?", "question_id": "a1", "choices": ["x", "y", "z", "w"]}
    known = row | {"correct_choice_idx": 2, "direct_answers": ["z", "z", "y"]}
    for split, rows in (("train", [known]), ("val", [known]), ("test", [row])):
        zoo_files.write(folder / f"aokvqa_v1p0_{split}.json", rows)
    zoo_files.write(folder / "specialized_vocab_train_lavis.json", ["z", "y"])
    datasets = build("aok_vqa", zoo_files.pictures(tmp_path))
    assert datasets["train"][0]["answers"] == ["z", "y"]
    assert datasets["train"][0]["weights"] == pytest.approx([2 / 3, 1 / 3])
    batch = datasets["val"].collater([datasets["val"][0]])
    keys = {"image", "text_input", "question_id", "instance_id", "choices", "correct_choice_idx", "direct_answers"}
    assert set(batch) == keys
    assert batch["direct_answers"] == [["z", "z", "y"]]
    hidden = datasets["test"][0]
    assert (hidden["correct_choice_idx"], hidden["direct_answers"]) == (None, None)


def test_gqa(cache: Path, tmp_path: Path) -> None:
    own = {"201": {"imageId": "val2014/COCO_val2014_000000000042", "question": "Is it red?", "answer": "yes"}}
    lavis = [{"image": zoo_files.NAMES[0], "question": "Is it red?", "question_id": "201"}]
    for name, rows in (("train", own), ("testdev", own), ("test", lavis)):
        zoo_files.write(cache / f"gqa/annotations/{name}_balanced_questions.json", rows)
    datasets = build("gqa", zoo_files.pictures(tmp_path), type="balanced_testdev")
    assert (datasets["train"][0]["answers"], datasets["train"][0]["weights"]) == (["yes"], [1.0])
    sample = datasets["val"][0]
    assert set(sample) == {"image", "text_input", "answer", "question_id", "instance_id"}
    assert (sample["answer"], sample["question_id"]) == ("yes", "201")
    assert datasets["test"][0]["answer"] is None


def test_visual_genome_beside_vqa(cache: Path, tmp_path: Path) -> None:
    zoo_files.coco_vqa(cache)
    root = zoo_files.pictures(tmp_path / "pictures")
    rows = [{"image": zoo_files.NAMES[1], "question": "What is it?", "answer": "a square", "dataset": "vg"}]
    zoo_files.write(cache / "vg/annotations/vg_qa.json", rows)
    vg, vqa = build("vg_vqa", root)["train"], build("coco_vqa", root)["train"]
    assert isinstance(vg, VGVQADataset)
    both = ConcatDataset([vqa, vg])
    batch = both.collater([both[0], both[4]])
    assert batch["weight"].tolist() == pytest.approx([0.6, 0.4, 0.2])


@pytest.mark.parametrize("answer", [[], 3, ["red", None]])
def test_answers_that_are_none(answer: object, tmp_path: Path) -> None:
    row = zoo_files.questions()[0] | {"answer": answer}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(DataError, match=r"rows\.json, row 1: the field 'answer' is"):
        VGVQADataset(vis_root=zoo_files.pictures(tmp_path), ann_paths=[path])[0]


def test_one_step_of_training(cache: Path, tmp_path: Path) -> None:
    """Trap: with LAVIS's collater `weight` is a list, and BLIP's forward fails."""
    zoo_files.coco_vqa(cache)
    fixture = Path(__file__).resolve().parents[1] / "fixtures/blip_vqa/open/checkpoint"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = load_model(
        "blip_vqa", "vqav2", checkpoint=fixture, config={"vision_config": sizes, "image_size": 64, "max_txt_len": 10}
    )
    processor = {"train": {"name": "blip_image_train", "image_size": 64}}
    train = build("coco_vqa", zoo_files.pictures(tmp_path), vis_processor=processor)["train"]
    loss = model(train.collater([train[0], train[1]]))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
