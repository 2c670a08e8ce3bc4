"""Files of one's own as datasets: conversations for the chat families, phrases with boxes for grounding."""

import functools
import json
import logging
import operator
import pickle
from pathlib import Path
from typing import Any

import pytest
import zoo_files
from test_formats import jpeg, picture, said, write
from torch.utils.data import DataLoader

from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.formats.dataset import ConversationDataset, ReferringDataset

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def build(name: str, info: dict[str, Any], **section: Any) -> dict[str, Any]:
    config = Config({"datasets": {name: {"build_info": info, **section}}})
    return registry.get_builder_class(name)(config.datasets_cfg[name]).build_datasets()


def rows(*answers: str) -> list[dict[str, Any]]:
    return [
        {"id": f"row{at}", "image": "a.png", "messages": said("<image>What?", one)} for at, one in enumerate(answers)
    ]


def test_conversations(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "pix")
    write(tmp_path / "one.jsonl", rows("A", "B"))
    write(tmp_path / "two.json", rows("C"))
    monkeypatch.chdir(tmp_path)
    annotations = {"train": {"storage": ["one.jsonl", "two.json"]}, "val": {"storage": "two.json"}}
    datasets = build("conversations", {"annotations": annotations, "images": {"storage": "pix"}})
    train = datasets["train"]
    assert (len(train), len(datasets["val"])) == (3, 1)
    assert [train[index]["id"] for index in range(3)] == ["row0", "row1", "row0"]
    assert train[2]["instance_id"] == "2"
    assert train.where(2) == "two.json, row 1"
    batch = train.collater([train[0], train[2]])
    assert set(batch) == {"messages", "id", "instance_id"}
    assert batch["messages"][1][1]["content"] == "C"
    assert batch["messages"][0][0]["content"][0]["image"].size == (20, 16)


def test_a_dataset_goes_to_worker_processes(cache: Path, tmp_path: Path) -> None:
    picture(tmp_path)
    dataset = ConversationDataset(ann_paths=[write(tmp_path / "rows.json", rows("A", "B"))])
    again = pickle.loads(pickle.dumps(dataset))
    assert again[1] == dataset[1]
    folder = tmp_path / "sft"
    picture(folder / "images", "1.png")
    write(folder / "labels" / "1.json", {"conversations": said()})
    again = pickle.loads(pickle.dumps(ConversationDataset(ann_paths=[folder])))
    assert again[0]["id"] == "labels/1"


def test_a_batch_becomes_tensors(cache: Path, tmp_path: Path) -> None:
    import lavish

    picture(tmp_path)
    dataset = ConversationDataset(ann_paths=[write(tmp_path / "rows.json", rows("Red.", "A red square."))])
    batch = dataset.collater([dataset[0], dataset[1]])
    processor = lavish.load(FIXTURES / "cogvlm2" / "open" / "checkpoint").processor
    inputs = processor.apply_chat_template(batch["messages"], return_labels=True, padding_side="right")
    assert inputs["labels"].shape == inputs["input_ids"].shape
    assert (inputs["labels"] != -100).any(dim=1).all()
    assert len(inputs["pixel_values"]) == 2


def test_broken_rows(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path)
    path = write(tmp_path / "rows.jsonl", [*rows(*"abc"), {"messages": said()[:1]}])
    info = {"annotations": {"train": {"storage": str(path)}}}
    train = build("conversations", info, max_broken=0.5)["train"]
    with caplog.at_level(logging.WARNING):
        assert train[3]["id"] == "row0"
    assert "rows.jsonl, row 4: the conversation ends with a question" in caplog.text
    assert train.num_broken == 1
    with pytest.raises(DataError, match=r"rows\.jsonl, row 4: .*1 of 4 samples are broken and 1\.0% may"):
        build("conversations", info)["train"][3]


def test_streams(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import tarfile

    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for at in range(2):
                said_json = json.dumps({"messages": said("<image>What?", "" if (shard, at) == (2, 1) else "Red.")})
                for name, content in ((f"{shard}{at}.png", jpeg()), (f"{shard}{at}.json", said_json.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    info: dict[str, Any] = {"annotations": {"train": {"storage": f"{tmp_path}/{{0..2}}.tar"}}, "streaming": True}
    stream = build("conversations", info)["train"]
    with caplog.at_level(logging.WARNING):
        found = [sample["id"] for sample in stream]
    assert found == ["00", "01", "10", "11", "20"]
    assert stream.num_broken == 1
    assert "2.tar, sample '21': message 1 (of the assistant) is empty" in caplog.text
    assert stream.collater([next(iter(stream))])["id"] == ["00"]
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(sample["id"] for sample in loader) == found, "each reader takes whole shards"
    monkeypatch.setenv("WORLD_SIZE", "4")
    shares = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        shares.append([sample["id"] for sample in stream])
    assert sorted(functools.reduce(operator.iadd, shares, [])) == found, (
        "more readers than shards: each takes every fourth row"
    )
    assert all(shares)
    with pytest.raises(DataError, match=r"is a stream; set build_info\.streaming: true"):
        build("conversations", {**info, "streaming": False})


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        ({}, ConfigError, r"names no file: set build_info\.annotations\.train\.storage"),
        (
            {"annotations": {"train": {"storage": "nowhere.json"}}},
            DataError,
            "nowhere.json: the data 'train' are not here; looked in /.* and in the cache, /",
        ),
        ({"annotations": {"train": {"storage": "."}}, "prompt": 3}, ConfigError, "prompt is 3; a text"),
        ({"annotations": {"train": {"storage": "{0..2}/nowhere.tar"}}, "streaming": True}, DataError, "no such shard"),
        (
            {"annotations": {"train": {"url": "https://x.y/z.jsonl"}}},
            DataError,
            r"z\.jsonl: .* LAVISH_OFFLINE is set\. Fetch https://x\.y/z\.jsonl elsewhere",
        ),
        ({"annotations": {"train": {"storage": "."}}, "format": "lava"}, ConfigError, "Did you mean 'llava'"),
        ({"annotations": {"train": {"storage": "."}}, "streaming": "yes"}, ConfigError, "streaming is 'yes'"),
        ({"formt": "llava"}, ConfigError, r"build_info\.formt: unknown key. Did you mean 'format'"),
    ],
)
def test_wrong_settings(info: dict[str, Any], error: type[Exception], message: str, cache: Path) -> None:
    with pytest.raises(error, match=message):
        build("conversations", info)


def test_a_processor_that_nobody_would_use(cache: Path, tmp_path: Path) -> None:
    info = {"annotations": {"train": {"storage": str(write(tmp_path / "rows.json", rows("a")))}}}
    with pytest.raises(ConfigError, match=r"conversations\.vis_processor: conversations go to the model's own"):
        build("conversations", info, vis_processor={"train": {"name": "blip_image_train"}})
    with pytest.raises(ConfigError, match=r"max_broken: .* a stream"):
        build("conversations", {**info, "streaming": True}, max_broken=0.1)


def test_phrases_beside_their_pictures(cache: Path, tmp_path: Path) -> None:
    """Found as `lavish data check` finds them, and under all names that a row may give its picture."""
    zoo_files.pictures(tmp_path / "images", ("x.jpg",))
    row = {"expression": "the dog", "bbox": [2, 4, 10, 8], "width": 20, "height": 16}
    info = {"annotations": {"val": {"storage": str(tmp_path / "rows.json")}}, "images": {"storage": None}}
    for name in ("image", "file_name"):
        write(tmp_path / "rows.json", [{**row, name: "x.jpg"}])
        assert build("refcoco", info)["val"][0]["image"].size == (20, 16)
    for given, told in ((["x.jpg", "x.jpg"], "names 2 files; a phrase belongs to one picture"), ([], "names 0 files")):
        write(tmp_path / "rows.json", [{**row, "image": given}])
        with pytest.raises(DataError, match=rf"rows\.json, row 1: {told}"):
            build("refcoco", info)["val"][0]
    for key, value, told in (("expression", 3, "the expression is 3"), ("bbox", [20, 0, 1, 1], "beside the picture")):
        write(tmp_path / "rows.json", [{**row, "image": "x.jpg"}, {**row, key: value}])
        with pytest.raises(DataError, match=rf"rows\.json, row 2: .*{told}"):
            build("refcoco", info)
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "image": "x.jpg"}) + "\n{")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: no JSON"):
        ReferringDataset(ann_paths=[tmp_path / "rows.jsonl"])


def test_phrases_with_boxes(cache: Path, tmp_path: Path) -> None:
    zoo_files.pictures(tmp_path / "pix", ("x.jpg",))
    row = {"image": "x.jpg", "expression": "the dog", "bbox": [2, 4, 10, 8], "width": 20, "height": 16, "ref_id": 9}
    mdetr = {
        "images": [{"id": 5, "file_name": "x.jpg", "width": 20, "height": 16, "caption": "the cat"}],
        "annotations": [{"image_id": 5, "bbox": [2, 4, 10, 8]}],
    }
    annotations = {
        "val": {"storage": str(write(tmp_path / "rows.jsonl", [row]))},
        "test": {"storage": str(write(tmp_path / "mdetr.json", mdetr))},
    }
    datasets = build("refcoco", {"annotations": annotations, "images": {"storage": str(tmp_path / "pix")}})
    sample = datasets["val"][0]
    assert {key: sample[key] for key in ("text_input", "ref_id", "instance_id")} == {
        "text_input": "the dog",
        "ref_id": 9,
        "instance_id": "0",
    }
    assert sample["image"].size == (20, 16)
    assert datasets["test"][0]["text_input"] == "the cat"
    assert datasets["test"].annotation[0]["bbox"] == [2, 4, 10, 8]
    path = write(tmp_path / "bad.json", [row, {**row, "bbox": [1, 2]}])
    with pytest.raises(DataError, match=r"bad\.json, row 2: bbox is \[1, 2\]"):
        ReferringDataset(ann_paths=[path])
    with pytest.raises(DataError, match="holds messages, no phrases with boxes"):
        ReferringDataset(ann_paths=[write(tmp_path / "other.json", rows("a"))])
